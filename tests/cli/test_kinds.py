"""Weights that are no linear layers, through the command line: train, PEFT, eval, merge and back, unmerge, extract."""

import json

import pytest
import torch
from layers import relative_difference
from peft import PeftModel
from running import write_recipe, write_rows
from tiny import byte_tokenizer, tiny_base
from transformers import AutoModelForCausalLM

from lora_cli.lora.peft_format import load_adapter
from lora_cli.models.base import Base
from lora_cli.models.load import load_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),  # PEFT's, on tied weights
]

# Tokens of the rows that are trained: of a table, no others change
IDS = torch.tensor([byte_tokenizer()("what is the cat 3? the answer")["input_ids"]])
AGREE = 2e-6  # float32, against the largest logit; merging sums in another order

TARGETS = {
    "the table": ("llama", ["embed_tokens"]),
    "the tied table": ("llama-tied", ["embed_tokens", "q_proj"]),
    "the tied head": ("llama-tied", ["lm_head"]),
    "both sides of a tie": ("llama-tied", ["embed_tokens", "lm_head"]),
    "a scaled table": ("gemma3", ["embed_tokens"]),
    "positions": ("gpt2", ["wte", "wpe", "c_attn"]),
    "experts": ("mixtral", ["experts.gate_up_proj", "experts.down_proj", "v_proj"]),
    "one of the experts' weights": ("qwen3_moe", ["experts.down_proj"]),
    "turned experts": ("gpt_oss", ["experts.gate_up_proj", "experts.down_proj"]),
}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("case", TARGETS)
def test_a_kind_of_weight_through_train_peft_eval_merge_and_back(case, lora, tmp_path):
    name, targets = TARGETS[case]
    base, out = tiny_base(tmp_path / "base", name), tmp_path / "out"
    rows = write_rows(tmp_path / "held_out.jsonl", 5)

    lora("train", write_recipe(tmp_path, base, {"lora.targets": targets, "training.max_steps": 3}))
    ours = load_model(Base("tiny", base), dtype=torch.float32)
    untrained = logits(ours)
    load_adapter(out).inject_into(ours)
    assert relative_difference(logits(ours), untrained) > 1e-4

    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), out)
    assert relative_difference(logits(peft_model), logits(ours)) <= AGREE

    measured = lora("eval", "--adapter", out, "--data", rows, "--json").json
    assert measured["adapter"]["loss"] < measured["base"]["loss"]

    lora("merge", "--adapter", out)
    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    assert relative_difference(logits(merged), logits(ours)) <= AGREE

    lora("unmerge", "--merged", out / "merged", "--adapter", out, "--base", base, "--out", tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert relative_difference(logits(again), untrained) <= AGREE

    r = json.loads((out / "adapter_config.json").read_text())["r"]
    lora(
        "extract",
        "--base",
        base,
        "--tuned",
        out / "merged",
        "--r",
        r,
        "--targets",
        ",".join(targets),
        "--out",
        tmp_path / "x",
    )
    found = load_model(Base("tiny", base), dtype=torch.float32)
    load_adapter(tmp_path / "x").inject_into(found)
    assert (
        relative_difference(logits(found), logits(ours)) <= AGREE * 10
    )  # differences of weights, taken apart and put together
