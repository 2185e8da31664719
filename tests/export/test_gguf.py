"""GGUF adapters and models: llama.cpp itself answers as base + adapter do, and what it would read wrongly is refused."""

import json
from pathlib import Path

import gguf
import pytest
import torch
from adapters import logits_of, write_random
from llama_cpp import expected_log_probs, log_probs
from safetensors.torch import load_file
from tiny import CONFIGS, byte_tokenizer, tiny_base
from transformers import AutoModelForCausalLM

from lora_cli.export import gguf_adapter, gguf_model
from lora_cli.export.gguf import ARCHITECTURES
from lora_cli.export.gguf_model import write_model_file
from lora_cli.lora.peft_format import load_adapter
from lora_cli.models.base import Base

ROWS = [[5, 17, 72, 31, 8, 90, 41], [7, 100, 12, 12, 64], [9, 11, 40], [80, 81, 82, 83], [33, 44, 55, 66, 77]]
AGREE = 2e-6
GELU = 5e-4  # ggml looks GELU up in a table of float16
MODELS = ("llama", "llama-tied", "mistral", "qwen2", "qwen3", "phi3", "gpt2", "gemma2", "gemma3")
TWISTS = {"rank_pattern": {r".*\.1\..*": 3}, "alpha_pattern": {".*mlp.*": 5}, "use_rslora": True, "size": 0.1}


def base_of(folder: Path, name: str) -> Path:
    """A tiny base; Gemma's queries scaled as llama.cpp scales them."""
    config = CONFIGS[name]()
    if not hasattr(config, "query_pre_attn_scalar"):
        return tiny_base(folder, name)
    config.query_pre_attn_scalar = config.head_dim
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def worst(found, expected) -> float:
    """The largest difference of any log-probability, of the rows that llama.cpp tells them of."""
    told = [(one, other) for one, other in zip(found, expected, strict=True) if one is not None]
    assert len(told) >= 2
    assert all(one.isfinite().all() and len(one) > 250 for one, _ in told)
    return max(float((one - other[: len(one)]).abs().max()) for one, other in told)


def test_every_architecture_that_is_written_is_tested_against_llama_cpp():
    assert {CONFIGS[name]().model_type for name in MODELS} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_answers_with_either_file_as_base_and_adapter_do(lora, tmp_path, name):
    base = base_of(tmp_path / "tiny", name)
    out = write_random(tmp_path / "out", base, **TWISTS)
    expected = expected_log_probs(logits_of(base, load_adapter(out), ROWS))
    write_model_file(base, tmp_path / "base.gguf", "float32", base=Base("tiny", base))

    told = lora("export", "--adapter", out, "--to", "gguf-adapter", "--out", tmp_path / "a.gguf", "--json").json
    whole = lora("export", "--adapter", out, "--to", "gguf", "--out", tmp_path / "m.gguf", "--json").json

    tolerance = GELU if name in ("gpt2", "gemma2", "gemma3") else AGREE
    assert worst(log_probs(tmp_path / "base.gguf", tmp_path / "a.gguf", ROWS), expected) < tolerance
    assert worst(log_probs(tmp_path / "m.gguf", rows=ROWS), expected) < tolerance
    without = expected_log_probs(logits_of(base, None, ROWS))
    assert max(float((one - other).abs().max()) for one, other in zip(expected, without, strict=True)) > 0.1
    assert [entry["trait"] for entry in told["findings"]] == ["rslora", "scales"]
    assert 0 < told["difference"] < 1e-7
    assert told["proof"]["largest_logit_difference"] < 1e-5
    assert whole["proof"]["largest_logit_difference"] < 1e-4


def test_llama_cpp_looks_up_an_adapted_embedding_and_multiplies_by_an_adapted_head(lora, tmp_path):
    base = base_of(tmp_path / "tiny", "llama")
    out = write_random(tmp_path / "out", base, ["embed_tokens", "lm_head", "v_proj"], **TWISTS | {"size": 0.02})
    expected = expected_log_probs(logits_of(base, load_adapter(out), ROWS))
    without = expected_log_probs(logits_of(base, None, ROWS))
    assert max(float((one - other).abs().max()) for one, other in zip(expected, without, strict=True)) > 0.1
    write_model_file(base, tmp_path / "base.gguf", "float32", base=Base("tiny", base))

    lora("export", "--adapter", out, "--to", "gguf-adapter", "--out", tmp_path / "a.gguf")

    assert worst(log_probs(tmp_path / "base.gguf", tmp_path / "a.gguf", ROWS), expected) < AGREE


def test_a_plain_adapter_is_written_bit_for_bit_but_for_the_order_of_rows(lora, tmp_path):
    base = tiny_base(tmp_path / "tiny", "qwen2")
    out = write_random(tmp_path / "out", base, "qv", rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 4})

    done = lora("export", "--adapter", out, "--to", "gguf-adapter")

    assert done.out.splitlines()[0].endswith("read back and equal, bit for bit")
    assert f"written  {out / 'gguf-adapter/adapter.gguf'}" in done.out
    reader = gguf.GGUFReader(out / "gguf-adapter/adapter.gguf")
    ours = load_file(out / "adapter_model.safetensors")
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    assert reader.fields["adapter.lora.alpha"].contents() == 8
    assert (
        found["blk.1.attn_q.weight.lora_b"]
        == ours["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"].numpy()
    ).all()
    assert found["blk.1.attn_v.weight.lora_a"].shape == (2, 32)


@pytest.mark.parametrize(("type", "most"), [("float16", 2e-3), ("bfloat16", 2e-2), ("q8_0", 4e-2)])
def test_a_whole_model_in_few_bits_says_what_storing_costs_and_llama_cpp_reads_it(lora, tmp_path, type, most):
    base = tiny_base(tmp_path / "tiny")
    out = write_random(tmp_path / "out", base)
    expected = expected_log_probs(logits_of(base, load_adapter(out), ROWS))

    told = lora(
        "export", "--adapter", out, "--to", "gguf", "--dtype", type, "--out", tmp_path / "m.gguf", "--json"
    ).json

    assert told["stored"] == type
    assert 0 < told["proof"]["kl"] < 0.05 * told["proof"]["adapter_kl"]
    assert 1e-6 < told["proof"]["largest_logit_difference"] < most
    assert worst(log_probs(tmp_path / "m.gguf", rows=ROWS), expected) < most
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert stored["blk.0.attn_q.weight"] == gguf_model.TYPES[type]
    assert stored["blk.0.attn_norm.weight"] == "F32"
    assert stored["blk.0.ffn_down.weight"] == ("F16" if type == "q8_0" else gguf_model.TYPES[type])  # rows of 48


def test_llama_cpp_reads_text_as_the_tokenizer_does(tmp_path):
    base = tiny_base(tmp_path / "tiny")
    write_model_file(base, tmp_path / "base.gguf", "float32", base=Base("tiny", base))
    texts = ["the cat sat", "  what is 12,345?\n\n", "naïve — 你好 👍🏽", "<|im_start|>user\nhat<|im_end|>"]

    of_ids = log_probs(tmp_path / "base.gguf", rows=[byte_tokenizer()(text)["input_ids"] for text in texts])

    assert worst(log_probs(tmp_path / "base.gguf", rows=texts), of_ids) < 1e-6


@pytest.mark.parametrize(
    ("to", "name", "settings", "said"),
    [
        ("gguf", "opt", {}, "how llama.cpp stores a `opt` is not known here; known are llama, mistral,"),
        ("gguf-adapter", "opt", {}, "llama.cpp: a model of this kind: its files are written for llama, mistral,"),
        ("gguf-adapter", "llama", {"use_dora": True}, "llama.cpp: DoRA: its update depends on the base's row norms"),
        ("gguf-adapter", "llama-tied", {"targets": ["q_proj", "lm_head"]}, "llama.cpp: an adapted head that is tied"),
        (
            "gguf-adapter",
            "llama-tied",
            {"targets": ["embed_tokens"]},
            "llama.cpp: an adapted embedding that the head shares",
        ),
        (
            "gguf-adapter",
            "gpt2",
            {"targets": ["wpe"]},
            "llama.cpp: adapted positions: llama.cpp looks for an adapter of",
        ),
    ],
)
def test_what_a_file_can_not_hold_is_refused_with_a_way_out(lora, tmp_path, to, name, settings, said):
    base = tiny_base(tmp_path / "tiny", name)
    out = write_random(tmp_path / "out", base, **settings)

    done = lora("export", "--adapter", out, "--to", to, "--out", tmp_path / "x.gguf", code=4)

    assert said in done.err
    assert "`lora merge` it" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny"]


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"targets": ["q_proj", "lm_head"]}])
def test_a_whole_model_holds_what_an_adapter_file_can_not(lora, tmp_path, settings):
    base = tiny_base(tmp_path / "tiny", "llama-tied")
    out = write_random(tmp_path / "out", base, **settings)
    expected = expected_log_probs(logits_of(base, load_adapter(out), ROWS))

    lora("export", "--adapter", out, "--to", "gguf", "--out", tmp_path / "m.gguf")

    assert worst(log_probs(tmp_path / "m.gguf", rows=ROWS), expected) < AGREE


def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(lora, tmp_path):
    base = tiny_base(tmp_path / "tiny")
    core = json.loads((base / "tokenizer.json").read_text())
    core["pre_tokenizer"]["add_prefix_space"] = True
    (base / "tokenizer.json").write_text(json.dumps(core))

    done = lora("export", "--adapter", write_random(tmp_path / "out", base), "--to", "gguf", code=4)

    assert "llama.cpp may not read its tokenizer as it is: it cuts text by" in done.err
    assert not (tmp_path / "out/gguf/model.gguf").exists()


@pytest.mark.parametrize(
    ("to", "module", "name", "fault", "said"),
    [
        ("gguf", gguf_model, "in_pairs", lambda weight, heads: weight, "does not answer as base + adapter"),
        ("gguf-adapter", gguf_adapter, "in_pairs", lambda weight, heads: weight, "an update differs by"),
        ("gguf-adapter", gguf_adapter, "folded", lambda adapter, path: adapter.layers[path], "an update differs by"),
    ],
)
def test_a_file_that_is_not_base_and_adapter_never_appears(lora, tmp_path, monkeypatch, to, module, name, fault, said):
    out = write_random(tmp_path / "out", tiny_base(tmp_path / "tiny"), use_rslora=True, size=0.1)
    monkeypatch.setattr(module, name, fault)

    done = lora("export", "--adapter", out, "--to", to, "--out", tmp_path / "x.gguf", code=4)

    assert said in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny"]


def test_another_base_of_the_same_shape_is_refused_and_its_tensors_named(lora, tmp_path):
    out = write_random(tmp_path / "out", tiny_base(tmp_path / "tiny"))
    other = tiny_base(tmp_path / "other", seed=5)

    for to in ("gguf", "gguf-adapter"):
        done = lora("export", "--adapter", out, "--to", to, "--base", other, "--out", tmp_path / "x.gguf", code=4)
        assert "the adapter was trained on another base: they differ in lm_head.weight" in done.err
    done = lora(
        "export", "--adapter", out, "--to", "gguf-adapter", "--base", other, "--out", tmp_path / "x.gguf",
        "--allow-base-mismatch",
    )  # fmt: skip
    assert "NOT the base it was trained on (--allow-base-mismatch): lm_head.weight" in done.out
