"""Reading a base's safetensors files by hand, and the fingerprint made of them."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import tiny_base

from lora_cli.errors import ModelError, SafetyError
from lora_cli.lora.base_files import (
    INDEX,
    SAMPLED_BYTES,
    WEIGHTS,
    Fingerprint,
    fingerprint,
    read_header,
    sampled,
    stored_tensors,
    weight_files,
)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def base(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "base")


@pytest.fixture
def sharded(tmp_path):
    return tiny_base(tmp_path / "sharded", max_shard_size="40KB")


def flip(folder, name: str, offset: int) -> None:
    """Change one byte of a tensor's data."""
    tensor = stored_tensors(folder)[name]
    with tensor.file.open("r+b") as file:
        file.seek(tensor.start + offset)
        byte = file.read(1)[0]
        file.seek(tensor.start + offset)
        file.write(bytes([byte ^ 1]))


def test_headers_read_by_hand_say_what_safetensors_says(sharded):
    files = weight_files(sharded)
    assert len(files) > 2

    for file in files:
        with safe_open(file, "pt") as opened:
            found = read_header(file)
            assert set(found) == set(opened.keys())
            for name, tensor in found.items():
                assert tensor.shape == tuple(opened.get_slice(name).get_shape())
                assert tensor.dtype == opened.get_slice(name).get_dtype()
                data = file.read_bytes()[tensor.start : tensor.end]
                assert torch.equal(
                    torch.frombuffer(bytearray(data), dtype=torch.float32).view(tensor.shape), opened.get_tensor(name)
                )


def test_a_copy_has_the_same_fingerprint_and_another_seed_has_not(base, tmp_path):
    assert fingerprint(shutil.copytree(base, tmp_path / "copy")) == fingerprint(base)

    other = fingerprint(tiny_base(tmp_path / "other", seed=1))

    assert other.layout == fingerprint(base).layout
    assert set(fingerprint(base).differences(other)) <= set(stored_tensors(base))
    assert "model.layers.0.mlp.down_proj.weight" in fingerprint(base).differences(other)


def test_sharding_does_not_change_the_fingerprint(base, sharded):
    assert fingerprint(sharded) == fingerprint(base)


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_one_sampled_byte_changes_the_fingerprint_and_names_its_tensor(base, place):
    before = fingerprint(base)
    name = max(before.samples, key=lambda name: stored_tensors(base)[name].end - stored_tensors(base)[name].start)
    size = stored_tensors(base)[name].end - stored_tensors(base)[name].start
    assert size > 3 * SAMPLED_BYTES

    flip(base, name, {"first": 0, "middle": size // 2, "last": size - 1}[place])

    assert before.differences(fingerprint(base)) == [name]
    assert before.layout == fingerprint(base).layout


KINDS = {
    "llama-2-7b": (32, ["input_layernorm", "post_attention_layernorm", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj",
                        "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"]),
    "mixtral-8x7b": (32, ["input_layernorm", "self_attn.o_proj", "block_sparse_moe.gate",
                          *(f"block_sparse_moe.experts.{n}.w{m}" for n in range(8) for m in (1, 2, 3))]),
}  # fmt: skip


@pytest.mark.parametrize("model", KINDS)
def test_every_kind_of_tensor_is_sampled_over_the_whole_depth(model):
    """A base into which an adapter of one kind of module was merged is another base, whichever kind that is."""
    layers, kinds = KINDS[model]
    names = ["lm_head.weight", *(f"model.layers.{n}.{kind}.weight" for n in range(layers) for kind in kinds)]

    found = sampled(names)

    assert len(found) <= 128
    assert "lm_head.weight" in found
    for end in {kind.split(".")[-1] for kind in kinds}:
        depth = sorted({int(name.split(".")[2]) for name in found if name.endswith(f".{end}.weight")})
        assert len(depth) > 6
        assert depth[0] < 6
        assert depth[-1] > layers - 6


def test_samples_of_an_earlier_version_tell_bases_apart_where_both_have_them(base):
    found = fingerprint(base)
    earlier = Fingerprint(found.layout, dict(list(found.samples.items())[::3]))
    other = Fingerprint(found.layout, dict.fromkeys(found.samples, "x"))

    assert earlier.differences(found) == found.differences(earlier) == []
    assert earlier.differences(other) == list(earlier.samples)


def test_another_layout_is_told_where_no_sample_tells_it(base):
    before = fingerprint(base)

    assert before.differences(Fingerprint("another", before.samples)) == ["the names, types or shapes of the tensors"]
    assert before.differences(before) == []


def test_a_changed_type_or_shape_changes_the_layout(tmp_path):
    def layout(tensors):
        tmp_path.joinpath("m").mkdir(exist_ok=True)
        save_file(tensors, tmp_path / "m" / WEIGHTS)
        return fingerprint(tmp_path / "m").layout

    layouts = {layout({"a": torch.zeros(2, 3)}), layout({"a": torch.zeros(3, 2)}), layout({"b": torch.zeros(2, 3)})}
    assert len(layouts | {layout({"a": torch.zeros(2, 3, dtype=torch.int32)})}) == 4


def test_a_fingerprint_survives_its_own_text(base):
    found = fingerprint(base)

    assert Fingerprint.from_json(found.to_json()) == found
    assert len(found.short) == 12


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd.safetensors", "sub/model.safetensors"])
def test_an_index_that_leads_out_of_its_folder_is_refused(base, name):
    (base / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))

    with pytest.raises(SafetyError, match="the index points outside its folder") as error:
        weight_files(base)
    assert error.value.code == 9


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}'])
def test_an_index_that_can_not_be_read_is_told(base, text):
    (base / INDEX).write_text(text)

    with pytest.raises(ModelError, match=r"its `weight_map` can't be read|it is no JSON"):
        weight_files(base)


@pytest.mark.parametrize("name", ["", "..", "."])
def test_an_index_that_names_no_file_is_an_error(base, name):
    (base / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))

    with pytest.raises((ModelError, SafetyError)):
        weight_files(base)


def test_a_missing_shard_is_named(sharded):
    gone = weight_files(sharded)[1]
    gone.unlink()

    with pytest.raises(ModelError, match=f"{gone.name} is missing"):
        fingerprint(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "x.ckpt"])
def test_a_base_that_is_only_a_pickle_is_refused(base, name):
    (base / WEIGHTS).rename(base / name)

    with pytest.raises(SafetyError, match="the base has its weights as a pickle, which can run code when it is read"):
        fingerprint(base)


def test_a_pickle_beside_safetensors_is_no_matter(base):
    (base / "pytorch_model.bin").write_bytes(b"anything")

    assert [file.name for file in weight_files(base)] == [WEIGHTS]


def test_a_folder_without_weights_is_told(base):
    (base / WEIGHTS).unlink()

    with pytest.raises(ModelError, match=r"no model\.safetensors and no model\.safetensors\.index\.json"):
        fingerprint(base)


@pytest.mark.parametrize("size", [0, 5, 50])
def test_a_truncated_header_is_told(base, size):
    content = (base / WEIGHTS).read_bytes()
    (base / WEIGHTS).write_bytes(content[:size])

    with pytest.raises(ModelError, match="its header can't be read"):
        fingerprint(base)
