"""PEFT's two files: what is written, and what is refused when read."""

import json

import pytest
import torch
from layers import PATH, VARIANTS, config_of, frozen, inputs, randomize, trained, with_adapter
from safetensors.torch import load_file, save_file

from lora_cli.errors import DivergedError, ModelError, SafetyError
from lora_cli.lora.adapter import Adapter, Factors
from lora_cli.lora.base_files import Fingerprint, read_metadata
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.init import INITS
from lora_cli.lora.peft_format import CONFIG, NOT_READ, PREFIX, WEIGHTS, load_adapter, save_adapter, to_peft

KEYS = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout", "target_modules",
    "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias", "fan_in_fan_out",
    "modules_to_save", "layers_to_transform", "layers_pattern", "init_lora_weights", "inference_mode",
}  # fmt: skip
A_KEY, B_KEY = f"{PREFIX}{PATH}.lora_A.weight", f"{PREFIX}{PATH}.lora_B.weight"


@pytest.fixture
def saved(tmp_path):
    """A whole adapter on disk, with a fingerprint of its base."""
    adapter = Adapter.of(trained("Linear", "plain"), config_of("plain"), Fingerprint("abc", {"w": "d1"}))
    save_adapter(adapter, tmp_path / "out")
    return tmp_path / "out"


def change_config(folder, **changed) -> None:
    found = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(found | changed))


def change_tensors(folder, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def refused(folder, kind: type, match: str) -> Exception:
    with pytest.raises(kind, match=match) as error:
        load_adapter(folder)
    problem = error.value.problems[0]
    assert problem.where
    assert problem.fix
    return error.value


def test_a_config_has_the_same_keys_whatever_the_adapter():
    for variant in ("plain", "dora+rslora", "patterns"):
        assert set(to_peft(config_of(variant))) == KEYS
    assert to_peft(config_of("plain"), transposed=True)["fan_in_fan_out"] is True
    assert to_peft(config_of("plain"))["init_lora_weights"] is True


def test_a_whole_alpha_is_written_as_an_integer_and_targets_in_order(tmp_path):
    config = LoRAConfig(r=2, lora_alpha=16.0, target_modules=("v_proj", "k_proj"), alpha_pattern={"a": 8.0, "b": 2.5})

    save_adapter(Adapter(config, {"x.v_proj": Factors(torch.ones(2, 3), torch.ones(4, 2))}), tmp_path)

    text = (tmp_path / CONFIG).read_text()
    assert '"lora_alpha": 16,' in text
    assert '"a": 8,' in text
    assert '"b": 2.5' in text
    assert json.loads(text)["target_modules"] == ["k_proj", "v_proj"]


def test_the_files_are_float32_readable_by_all_and_the_same_bytes_at_every_save(saved, tmp_path):
    adapter = load_adapter(saved)

    assert {tensor.dtype for tensor in load_file(saved / WEIGHTS).values()} == {torch.float32}
    assert (saved / WEIGHTS).stat().st_mode & 0o044 == 0o044
    for _ in range(8):  # safetensors' own order of the metadata is drawn anew at every save
        save_adapter(adapter, tmp_path / "again")
        for name in (CONFIG, WEIGHTS):
            assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_fingerprint_of_the_base_travels_in_the_metadata(saved):
    assert load_adapter(saved).base == Fingerprint("abc", {"w": "d1"})
    assert read_metadata(saved / WEIGHTS)["format"] == "pt"


def test_half_precision_factors_are_read_as_float32(saved):
    change_tensors(saved, lambda t: t.update({name: tensor.half() for name, tensor in t.items()}))

    factors = load_adapter(saved).layers[PATH]

    assert factors.A.dtype == factors.B.dtype == torch.float32


def test_a_pickle_is_refused(saved):
    (saved / WEIGHTS).rename(saved / "adapter_model.bin")

    error = refused(saved, SafetyError, "adapter_model.bin is a pickle, which can run code when it is read")

    assert error.code == 9


def test_no_weights_and_no_config_are_told(saved):
    (saved / WEIGHTS).unlink()
    refused(saved, ModelError, "no adapter_model.safetensors")
    (saved / CONFIG).unlink()
    refused(saved, ModelError, "no adapter_config.json: this is no adapter folder")


@pytest.mark.parametrize("kind", ["LOHA", "IA3", None])
def test_other_methods_are_refused(saved, kind):
    change_config(saved, peft_type=kind)

    refused(saved, ModelError, f"`peft_type` is {kind!r}, not LORA")


FOREIGN = {
    "init_lora_weights": "pissa_niter_4",
    "bias": "some",
    "lora_bias": True,
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1],
    "layer_replication": [[0, 2]],
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "use_bdlora": True,
    "arrow_config": {"top_k": 1},
    "kasa_config": {"beta": 1},
    "velora_config": {"x": 1},
    "monteclora_config": {"x": 1},
    "ensure_weight_tying": True,
}


@pytest.mark.parametrize("key", NOT_READ)
def test_a_setting_that_would_be_ignored_is_refused(saved, key):
    change_config(saved, **{key: FOREIGN[key]})

    refused(saved, ModelError, f"the adapter uses `{key}: ")


def test_all_settings_that_would_be_ignored_are_told_at_once(saved):
    change_config(saved, bias="some", lora_bias=True)

    with pytest.raises(ModelError) as error:
        load_adapter(saved)

    assert len(error.value.problems) == 2


@pytest.mark.parametrize("text", ["{", "", "null", "[1]", "\x00\x01"])
def test_a_config_that_is_no_json_object_is_told(saved, text):
    (saved / CONFIG).write_text(text)

    refused(saved, ModelError, "it is no JSON")


@pytest.mark.parametrize(
    "changed",
    [
        {"r": "many"},
        {"r": 0},
        {"r": -4},
        {"r": True},
        {"r": 4.0},
        {"r": 10**400},
        {"r": None},
        {"lora_alpha": "high"},
        {"lora_alpha": None},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": 0},
        {"lora_alpha": -16},
        {"lora_alpha": 10**400},
        {"lora_alpha": True},
        {"lora_dropout": "much"},
        {"lora_dropout": -0.1},
        {"target_modules": 7},
        {"target_modules": ["q_proj", 7]},
        {"base_model_name_or_path": ["a", "b"]},
        {"base_model_name_or_path": {"name": "a"}},
        {"revision": 1},
        {"task_type": ["CAUSAL_LM"]},
        {"use_dora": "yes"},
        {"use_rslora": 1},
        {"fan_in_fan_out": "no"},
        {"rank_pattern": [1]},
        {"rank_pattern": {"proj": "x"}},
        {"rank_pattern": {"*": 4}},
        {"rank_pattern": {"proj": 0}},
        {"alpha_pattern": {"proj": -1}},
        {"alpha_pattern": {"proj": None}},
    ],
    ids=str,
)
def test_a_config_with_nonsense_in_it_is_told_and_no_crash(saved, changed):
    change_config(saved, **changed)

    refused(saved, ModelError, next(iter(changed)))


def test_what_a_value_must_be_is_said_in_a_short_line(saved):
    change_config(saved, r=0, base_model_name_or_path=["x" * 1000])

    with pytest.raises(ModelError) as error:
        load_adapter(saved)

    assert [problem.what for problem in error.value.problems] == [
        f"`base_model_name_or_path: ['{'x' * 78}…` must be a text or null",
        "`r: 0` must be a whole number above 0",
    ]


def test_a_config_nested_without_end_is_no_json(saved):
    (saved / CONFIG).write_text("[" * 100_000)

    refused(saved, ModelError, "it is no JSON")


def test_a_huge_config_is_refused(saved):
    change_config(saved, auto_mapping="x" * 1_000_001)

    refused(saved, SafetyError, "it is larger than 1,000,000 bytes")


def test_a_missing_factor_is_named(saved):
    change_tensors(saved, lambda tensors: tensors.pop(B_KEY))

    refused(saved, ModelError, "proj lacks lora_B")


def test_a_missing_magnitude_is_named(saved):
    change_config(saved, use_dora=True)

    refused(saved, ModelError, "proj lacks lora_magnitude_vector")


def test_a_magnitude_that_the_config_does_not_know_of_is_refused(saved):
    change_tensors(saved, lambda t: t.update({f"{PREFIX}{PATH}.lora_magnitude_vector": torch.ones(96)}))

    refused(saved, ModelError, "lora_magnitude_vector")


@pytest.mark.parametrize("part", [A_KEY, B_KEY])
def test_a_rank_that_is_not_the_configs_is_told(saved, part):
    change_tensors(saved, lambda tensors: tensors.update({part: tensors[part].T[:3].contiguous()}))

    refused(saved, ModelError, "and adapter_config.json says rank 4")


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.proj.base_layer.weight",
        "base_model.model._orig_mod.proj.lora_C.weight",
        "base_model.model.embed.lora_embedding_C",
    ],
)
def test_surplus_tensors_are_refused(saved, name):
    change_tensors(saved, lambda tensors: tensors.update({name: torch.ones(4, 64)}))

    refused(saved, ModelError, "1 tensors that are no LoRA factors, first")


def test_an_adapter_without_any_factors_is_refused(saved):
    save_file({}, saved / WEIGHTS)

    refused(saved, ModelError, "the adapter holds no LoRA factors at all")


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_file_is_told_as_damaged(saved, size):
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[:size])

    refused(saved, ModelError, "damaged|header can't be read")


@pytest.mark.parametrize("header", ["[]", '{"a": 1}', '{"a": {}}', '{"a": {"dtype": "F32", "shape": 3}}', "null"])
def test_a_header_that_is_no_header_is_told_as_damaged(saved, header):
    (saved / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header.encode())

    refused(saved, ModelError, "header can't be read")


def test_a_header_that_claims_gigabytes_is_not_read(saved):
    (saved / WEIGHTS).write_bytes((2**40).to_bytes(8, "little") + b"{}")

    refused(saved, ModelError, "its header can't be read: it claims 1,099,511,627,776 bytes")


def test_a_header_larger_than_any_adapter_needs_is_refused(saved):
    header = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
    text = json.dumps(header).encode()
    (saved / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text)

    refused(saved, SafetyError, f"its header has {len(text):,} bytes")


def test_the_largest_adapter_in_sight_is_read(tmp_path):
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    names += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    paths = [f"model.language_model.layers.{i}.{name}" for i in range(126) for name in names]
    layers = {path: Factors(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1)) for path in paths}
    save_adapter(Adapter(config_of("dora", r=1), layers), tmp_path)

    assert load_adapter(tmp_path).layers.keys() == layers.keys()


def test_a_file_of_gigabytes_is_refused_unread(saved):
    with (saved / WEIGHTS).open("r+b") as file:
        file.truncate(4_000_000_001)  # sparse: it takes no room

    refused(saved, SafetyError, "it is larger than 4,000,000,000 bytes")


def test_a_tensor_that_stands_twice_is_refused(saved):
    content = (saved / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    entry = json.dumps(json.loads(content[8:end])[A_KEY])
    header = content[8:end].rstrip()[:-1] + f', "{A_KEY}": {entry}}}'.encode()
    (saved / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + content[end:])

    refused(saved, ModelError, "its header can't be read")


@pytest.mark.parametrize("text", ["no json", "[]", '{"layout": 1}', '{"layout": "x", "samples": 3}'])
def test_a_fingerprint_that_can_not_be_read_is_told_as_damage(saved, text):
    tensors = load_file(saved / WEIGHTS)
    save_file(tensors, saved / WEIGHTS, metadata={"lora.base_fingerprint": text})

    refused(saved, ModelError, "fingerprint")


def changed_factor(saved, change) -> Adapter:
    change_tensors(saved, lambda tensors: change(tensors[B_KEY]))
    return load_adapter(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(saved, value):
    change_tensors(saved, lambda tensors: tensors[B_KEY][3].fill_(value))

    error = refused(saved, DivergedError, "values that are not finite in 1 layers, first proj")

    assert error.code == 6


def test_an_adapter_that_does_nothing_is_refused(saved):
    adapter = changed_factor(saved, lambda B: B.zero_())

    with pytest.raises(DivergedError, match="the adapter does nothing: every lora_B is zero"):
        adapter.check_alive()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_was_only_taken_off_again_does_nothing(init):
    adapter = Adapter.of(with_adapter("Linear", "plain", init), config_of("plain"))

    with pytest.raises(DivergedError, match="the adapter does nothing: every lora_B · lora_A is zero"):
        adapter.check_alive()


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_living_adapter_passes(variant, init):
    Adapter.of(trained("Linear", variant, init), config_of(variant)).check_alive()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_small_update_beside_a_large_start_is_seen(init):
    model = with_adapter("Linear", "plain", init)
    randomize(model, size=1e-5)

    Adapter.of(model, config_of("plain")).check_alive()


def test_equal_digests_are_equal_updates(saved):
    adapter = load_adapter(saved)

    assert adapter.digest() == load_adapter(saved).digest()
    assert adapter.digest() != changed_factor(saved, lambda B: B[0].add_(1e-6)).digest()
    change_config(saved, lora_alpha=7)
    assert adapter.digest() != load_adapter(saved).digest()


def test_another_shape_is_told_with_the_module_and_both_shapes(saved):
    adapter = load_adapter(saved)
    model = frozen("Linear")
    model.proj = torch.nn.Linear(32, 96)

    with pytest.raises(ModelError) as error:
        adapter.inject_into(model)

    assert str(error.value) == (
        "error: proj is [96, 32] in this base, and [96, 64] in the adapter\n"
        "  fix: give the base it was trained on with `--base`"
    )


def test_modules_that_the_base_lacks_are_told_three_at_most():
    one = Factors(torch.ones(2, 3), torch.ones(4, 2))
    adapter = Adapter(config_of("plain"), {f"layers.{i}.q": one for i in range(5)})

    with pytest.raises(ModelError) as error:
        adapter.inject_into(frozen("Linear"))

    told = [problem.what for problem in error.value.problems]
    assert told == [f"the adapter changes layers.{i}.q, which this base does not have" for i in range(3)] + [
        "… and 2 layers more"
    ]


def test_a_refused_adapter_leaves_the_model_as_it_was():
    model, x = frozen("Linear"), inputs()
    before = model(x)

    with pytest.raises(ModelError):
        Adapter(config_of("plain"), {PATH: Factors(torch.ones(4, 3), torch.ones(96, 4))}).inject_into(model)

    assert type(model.proj) is torch.nn.Linear
    assert torch.equal(model(x), before)
