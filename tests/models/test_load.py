"""Models and tokenizers in memory: complete or refused, frozen, of the type that was asked for."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, byte_tokenizer, tiny_base, tiny_model

from lora_cli.data.types import Example, RowId
from lora_cli.errors import ModelError
from lora_cli.lora.inject import linears
from lora_cli.lora.weights import storage_of
from lora_cli.models.base import Base
from lora_cli.models.load import (
    check_vocabulary,
    default_device,
    head_paths,
    load_model,
    load_tokenizer,
    resolve_dtype,
)

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 17, 200, 31, 8]])


@pytest.fixture
def base(tmp_path):
    return tiny_base(tmp_path / "base")


def load(folder, **settings):
    return load_model(Base("tiny", folder), **{"dtype": torch.float32} | settings)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_saved_model_frozen_and_in_evaluation_mode(name, tmp_path):
    model = load(tiny_base(tmp_path, name))

    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, tiny_model(name)(input_ids=IDS).logits)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_type_is_the_one_asked_for_whatever_the_file_has(base, dtype):
    assert {p.dtype for p in load(base, dtype=dtype).parameters()} == {dtype}


@pytest.mark.parametrize(("quantize", "storage"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_a_quantized_base_holds_every_linear_layer_but_the_head_in_that_storage(name, quantize, storage, tmp_path):
    model = load(tiny_base(tmp_path, name), quantize=quantize)

    kinds = {path: storage_of(module).class_name for path, module in linears(model).items()}
    head = head_paths(model)
    assert {kind for path, kind in kinds.items() if path not in head} == {storage}
    assert {kinds[path] for path in head} == {"Linear"}


def test_four_bits_are_nf4_with_double_quantisation(base):
    state = load(base, quantize="nf4").model.layers[0].mlp.up_proj.weight.quant_state

    assert state.quant_type == "nf4"
    assert state.nested


def change_weights(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_weights_are_refused_and_not_made_up(base):
    change_weights(base, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))

    with pytest.raises(
        ModelError, match=r"the base has 1 weights missing, first model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        load(base)


def test_weights_of_another_shape_are_refused(base):
    change_weights(base, lambda t: t.update({"model.norm.weight": torch.ones(7)}))

    with pytest.raises(ModelError) as error:
        load(base)
    assert error.value.code == 4


def test_no_weights_at_all_are_refused(base):
    (base / "model.safetensors").unlink()

    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        load(base)


def test_a_truncated_file_is_refused(base):
    content = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(content[: len(content) // 2])

    with pytest.raises(ModelError, match="the base can't be loaded") as error:
        load(base)
    assert error.value.problems[0].where == str(base)


def test_an_unknown_architecture_is_refused(base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "brand_new"}))

    with pytest.raises(ModelError, match="the base can't be loaded"):
        load(base)


def mapped(folder) -> list[range]:
    """Where this process has the files of a folder in its memory."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    return [range(*(int(end, 16) for end in line.split()[0].split("-"))) for line in lines]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_a_base_in_shards_is_its_mapped_files_and_in_another_type_nothing_stays_of_them(name, tmp_path):
    """So each byte is read once, when it is used or converted, and none lies in memory twice."""
    base = tiny_base(tmp_path / "base", name, max_shard_size="60KB")
    assert len(list(base.glob("*.safetensors"))) > 1

    model = load(base)
    places = mapped(base)
    assert all(any(p.data_ptr() in place for place in places) for p in model.parameters())
    del model

    converted = load(base, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in converted.parameters())
    assert mapped(base) == []


def test_an_attention_that_is_not_installed_says_what_to_use(base):
    with pytest.raises(ModelError) as error:
        load(base, attention="flash")
    assert error.value.problems[0].fix.startswith("use `model.attention: sdpa`")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attentions_agree(base, attention):
    model = load(base, attention=attention)

    assert model.config._attn_implementation == attention
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=IDS).logits, tiny_model("llama")(input_ids=IDS).logits, atol=1e-5, rtol=0
        )


def test_auto_takes_bfloat16_where_the_hardware_multiplies_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    found = []
    for supported in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda supported=supported: supported)
        found.append(resolve_dtype("auto", CPU))

    assert found == [torch.bfloat16, torch.float32]
    assert resolve_dtype("float16", CPU) == torch.float16


def test_without_an_accelerator_it_is_the_cpu():
    if not torch.cuda.is_available():
        assert default_device() == CPU


def test_the_head_is_found_and_only_the_head():
    for name in CONFIGS:
        assert head_paths(tiny_model(name)) == {"lm_head"}


def test_a_token_that_the_model_has_no_embedding_for_is_told_with_its_row():
    rows = [Example(ids, [0.0] * len(ids), RowId("a.jsonl", i)) for i, ids in enumerate([[3, 319], [319, 4], [5]], 1)]
    check_vocabulary(tiny_model("llama"), rows)

    with pytest.raises(ModelError, match="makes token 320, and the model has embeddings for 0 to 319") as error:
        check_vocabulary(tiny_model("llama"), [*rows, Example([320], [0.0], RowId("a.jsonl", 9))])
    assert error.value.problems[0].where == "a.jsonl:9"


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_a_row_that_is_longer_than_the_models_positions_is_told(name):
    def rows(length: int):
        return [Example([3] * n, [0.0] * n, RowId("a.jsonl", n)) for n in (5, length, 7)]

    check_vocabulary(tiny_model(name), rows(256))

    with pytest.raises(ModelError) as error:
        check_vocabulary(tiny_model(name), rows(257))
    assert str(error.value) == (
        "error: a row has 257 tokens, and the model has positions for 256\n"
        "  --> a.jsonl:257\n"
        "  fix: set `data.max_length: 256`"
    )


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_token(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)

    found = load_tokenizer(tmp_path)

    assert found.pad_token_id == found.eos_token_id


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)

    with pytest.raises(ModelError, match="the tokenizer names no end token, so no answer could learn to stop"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_told(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)

    with pytest.raises(ModelError, match="the tokenizer can't be loaded"):
        load_tokenizer(tmp_path)
