"""A GGUF file as a base: dequantised once into a folder of safetensors."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from tiny import byte_tokenizer, tiny_model

from lora_cli.errors import ModelError
from lora_cli.models.base import resolve_base
from lora_cli.models.load import load_model, load_tokenizer

IDS = torch.tensor([[5, 17, 200, 31, 8, 90, 41]])


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: rotary halves interleaved."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def file(tmp_path):
    """A tiny Llama in bfloat16, as llama.cpp's converter would write it in 32 bits."""
    model, config = tiny_model("llama", dtype=torch.bfloat16), tiny_model("llama").config
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer, config.vocab_size)
    names = gguf.tensor_mapping.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        weight = parameter.detach().float().numpy()
        if (projection := name.split(".")[-2]) in heads:
            weight = permuted(weight, heads[projection])
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "tiny.gguf"


def add_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    core = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    tokens = sorted(core["model"]["vocab"], key=core["model"]["vocab"].get)
    special = {token["content"] for token in core["added_tokens"]}
    tokens += [f"<unused{i}>" for i in range(size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in core["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def test_a_gguf_base_answers_as_the_model_it_was_made_from(file):
    base = resolve_base(str(file))

    model = load_model(base, dtype=torch.bfloat16)

    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, tiny_model("llama", dtype=torch.bfloat16)(input_ids=IDS).logits)
    assert base.name == str(file)
    assert "quantization_config" not in json.loads((base.folder / "config.json").read_text())


def test_its_tokenizer_reads_text_as_the_original_does(file):
    tokenizer = load_tokenizer(resolve_base(str(file)).folder)

    text = "what is the answer to that question, é?"
    assert (
        tokenizer(text, add_special_tokens=False).input_ids
        == byte_tokenizer()(text, add_special_tokens=False).input_ids
    )
    assert tokenizer.eos_token_id == 2


def test_it_is_converted_once_and_a_copy_shares_the_conversion(file, tmp_path):
    first = resolve_base(str(file)).folder
    written = (first / "model.safetensors").stat().st_mtime_ns

    assert resolve_base(str(file)).folder == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    (tmp_path / "copy").mkdir()
    copy = shutil.copy(file, tmp_path / "copy" / file.name)
    assert resolve_base(str(copy)).folder == first


def test_another_content_is_another_conversion(file):
    first = resolve_base(str(file)).folder
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)

    assert resolve_base(str(file)).folder != first


def test_a_damaged_file_is_told_and_leaves_nothing_behind(file):
    cache = resolve_base(str(file)).folder.parent
    before = sorted(path.name for path in cache.iterdir())
    file.write_bytes(b"no gguf at all")

    with pytest.raises(ModelError, match="it is no GGUF file, or damaged"):
        resolve_base(str(file))

    assert sorted(path.name for path in cache.iterdir()) == before
