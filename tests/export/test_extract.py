"""A full fine-tune as an adapter: with rank enough, and what is no low-rank update held as it is, it is the tuned model."""

import shutil

import pytest
import torch
from adapters import answers_of, load, logits_of
from layers import relative_difference
from peft import PeftModel
from tensor_memory import TensorMemory
from tiny import VOCABULARY, tiny_base
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lora_cli.export.extract import extract
from lora_cli.export.extract_beside import Kept
from lora_cli.lora.base_files import stored_tensors
from lora_cli.lora.peft_format import load_adapter
from lora_cli.lora.tokens import ROWS
from lora_cli.models.base import Base

PEFT_ASKS = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
NORMS = "norm,input_layernorm,post_attention_layernorm"
# A base, and what it takes to hold all that a fine-tune of every parameter changes
WHOLE = {
    "llama": ["--modules-to-save", f"{NORMS},embed_tokens,lm_head"],
    "llama-tied": ["--modules-to-save", NORMS, "--targets", "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj,embed_tokens,lm_head"],
    "gpt2": ["--modules-to-save", "ln_1,ln_2,ln_f", "--bias", "all", "--targets", "c_attn,c_proj,c_fc,wpe,wte,lm_head"],
    "qwen2": ["--modules-to-save", f"{NORMS},embed_tokens,lm_head", "--bias", "lora_only"],
    "mixtral": ["--modules-to-save", f"{NORMS},embed_tokens,lm_head,mlp.gate", "--targets",
                "q_proj,k_proj,v_proj,o_proj,experts.gate_up_proj,experts.down_proj"],
}  # fmt: skip


def tuned(base, out, *, change=lambda name, p: p.add_(0.02 * torch.randn(p.shape)), tokens: int = 0, **saving):
    """A copy of the base, with a tokenizer that knows so many tokens more, after change(name, parameter)."""
    model, tokenizer = load(base), AutoTokenizer.from_pretrained(base)
    torch.manual_seed(1)
    if tokens:
        tokenizer.add_tokens([f"<new-{i}>" for i in range(VOCABULARY - len(tokenizer) + tokens)])
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change(name, parameter)
    model.save_pretrained(out, max_shard_size="30KB", **saving)
    tokenizer.save_pretrained(out)
    return out


def assert_answers(got, expected, tolerance: float = 2e-5) -> None:
    assert max(relative_difference(one, other) for one, other in zip(got, expected, strict=True)) <= tolerance


@pytest.mark.filterwarnings(PEFT_ASKS)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("name", WHOLE)
def test_an_adapter_that_holds_all_that_changed_is_the_tuned_model(name, lora, tmp_path):
    base = tiny_base(tmp_path / "base", name)
    model = tuned(base, tmp_path / "tuned")

    ask = ("extract", "--base", base, "--tuned", model, "--r", 64, *WHOLE[name], "--out", tmp_path / "x")
    found = lora(*ask, "--json").json

    assert found["left_out"] == []
    assert found["error"] < 1e-6
    adapter = load_adapter(tmp_path / "x")
    expected = answers_of(load(model))
    assert relative_difference(expected[0], logits_of(base)[0]) > 1e-2
    assert_answers(logits_of(base, adapter), expected)
    if name in ("llama", "qwen2"):
        assert_answers(answers_of(PeftModel.from_pretrained(load(base), tmp_path / "x")), expected)
    lora("merge", "--adapter", tmp_path / "x", "--base", base)
    assert_answers(answers_of(load(tmp_path / "x" / "merged")), expected)


def test_modules_held_whole_are_those_that_changed(lora, tmp_path):
    base = tiny_base(tmp_path / "base")
    touched = ("model.norm.weight", "model.layers.1.self_attn.q_proj.weight")
    model = tuned(base, tmp_path / "tuned", change=lambda name, p: p.mul_(1.5) if name in touched else None)

    ask = ("extract", "--base", base, "--tuned", model, "--r", 32)
    done = lora(*ask, "--modules-to-save", f"{NORMS},lm_head", "--out", tmp_path / "x")
    without = lora(*ask, "--out", tmp_path / "y")

    adapter = load_adapter(tmp_path / "x")
    assert list(adapter.extras) == ["model.norm"]
    assert adapter.config.modules_to_save == ("model.norm",)
    assert "beside   model.norm whole\n" in done.out
    assert "left out nothing: no other tensor has changed" in done.out
    assert "left out 1 tensors that changed and that this adapter does not hold" in without.out
    assert "`--modules-to-save NAMES` holds modules whole, `--bias all` biases" in without.out


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_rows_of_new_tokens_come_along_and_old_rows_are_compared(name, lora, tmp_path):
    """The tuned tokenizer goes into the adapter's folder: without their rows its new tokens would have no embedding."""
    base = tiny_base(tmp_path / "base", name)
    touched = ("q_proj", "v_proj")
    model = tuned(base, tmp_path / "tuned", tokens=3, change=lambda n, p: p.mul_(1.1) if n.split(".")[-2] in touched else None)  # fmt: skip

    done = lora("extract", "--base", base, "--tuned", model, "--r", 32, "--out", tmp_path / "x")

    adapter = load_adapter(tmp_path / "x")
    assert adapter.config.trainable_tokens == (VOCABULARY, VOCABULARY + 1, VOCABULARY + 2)
    assert all(state[ROWS].shape == (3, 32) for state in adapter.extras.values())
    assert "beside   the rows of 3 tokens that the base has none for\n" in done.out
    assert "left out nothing: no other tensor has changed" in done.out
    rows = [[5, VOCABULARY + 1, 17, VOCABULARY], [VOCABULARY + 2, 9]]
    expected = answers_of(load(model), rows)
    assert expected[0].shape[-1] == VOCABULARY + 3
    assert_answers(logits_of(base, adapter, rows), expected)
    lora("merge", "--adapter", tmp_path / "x", "--base", base)
    assert_answers(answers_of(load(tmp_path / "x" / "merged"), rows), expected)


def test_rows_of_no_token_are_nothing_to_hold_and_changed_rows_are_named(lora, tmp_path):
    """Tables that were only made longer, as for a multiple of 64, and tables that were made shorter."""
    base, longer = tiny_base(tmp_path / "base"), tmp_path / "longer"
    model = load(base)
    model.resize_token_embeddings(384, mean_resizing=False)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(2)
        head = model.lm_head.weight[:VOCABULARY].clone()
        model.lm_head.weight[100:200].mul_(1.5)
    model.save_pretrained(longer)
    shutil.copy(base / "tokenizer.json", longer)
    shutil.copy(base / "tokenizer_config.json", longer)

    grown = lora("extract", "--base", base, "--tuned", longer, "--r", 2, "--out", tmp_path / "x", "--json").json
    shrunk = lora("extract", "--base", longer, "--tuned", base, "--r", 2, "--out", tmp_path / "y", "--json").json

    assert load_adapter(tmp_path / "x").extras == load_adapter(tmp_path / "y").extras == {}
    changed = (0.5 * head[100:200].norm() / head.norm()).item()
    assert {left["name"]: left["relative"] for left in grown["left_out"]} == pytest.approx({"lm_head.weight": changed})
    assert [left["name"] for left in shrunk["left_out"]] == ["lm_head.weight"]
    logits_of(base, load_adapter(tmp_path / "x"))


REFUSED = {
    "no such module": (["--modules-to-save", "nope"], "`nope` in `lora.modules_to_save` matches no module of this model"),
    "another shape": (["--modules-to-save", "lm_head"], "lm_head.weight is [320, 32] in the base, and the tuned model has [323, 32]"),
    "no biases": (["--bias", "all"], "this model has no bias"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_held_is_refused_with_its_reason(case, lora, tmp_path):
    base = tiny_base(tmp_path / "base")
    model = tuned(base, tmp_path / "tuned", tokens=3)
    arguments, message = REFUSED[case]

    done = lora("extract", "--base", base, "--tuned", model, "--r", 2, *arguments, "--out", tmp_path / "x", code=4)

    assert message in done.err
    assert not (tmp_path / "x").exists()


def test_memory_holds_a_few_tensors_whatever_the_size_of_the_models(tmp_path):
    """Beside the adapter that is made: a weight of each model, their difference, and its decomposition in float64."""
    small = tiny_base(tmp_path / "small", "llama-tied")
    config = LlamaConfig.from_pretrained(small, num_hidden_layers=24, intermediate_size=128)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tuned_model = LlamaForCausalLM(config)
    tuned_model.save_pretrained(tmp_path / "tuned")
    del tuned_model
    sizes = [tensor.end - tensor.start for tensor in stored_tensors(tmp_path / "base").values()]

    with TensorMemory() as memory:
        found = extract(
            Base("base", tmp_path / "base"), Base("tuned", tmp_path / "tuned"), tmp_path / "x", r=1,
            kept=Kept(["norm"]),
        )  # fmt: skip

    # the adapter itself, and once more as it is read back
    beside_the_adapter = memory.peak - 2 * 4 * found.made.adapter.parameters
    assert max(sizes) < beside_the_adapter < 4 * max(sizes) < sum(sizes) / 3
