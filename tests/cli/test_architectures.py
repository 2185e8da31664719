"""Every architecture, as a tiny random model, through the command line: train, PEFT, eval, merge, and back."""

import pytest
import torch
from layers import relative_difference
from peft import PeftModel
from running import events, hashes, write_recipe, write_rows
from tiny import CONFIGS, tiny_base
from transformers import AutoModelForCausalLM

from lora_cli.lora.peft_format import load_adapter
from lora_cli.models.base import Base
from lora_cli.models.load import load_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[5, 17, 200, 31, 8, 90, 41], [7, 300, 12, 12, 64, 1, 2]])
AGREE = 2e-6  # float32, against the largest logit; merging sums in another order


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_an_architecture_through_train_peft_eval_merge_and_back(name, lora, tmp_path):
    base, out = tiny_base(tmp_path / "base", name), tmp_path / "out"
    before = hashes(base)
    rows = write_rows(tmp_path / "held_out.jsonl", 5)

    lora("train", write_recipe(tmp_path, base, {"data.eval": "25%", "training.max_steps": 3}))
    ours = load_model(Base("tiny", base), dtype=torch.float32)
    untrained = logits(ours)
    load_adapter(out).inject_into(ours)
    held_out = [event["loss"] for event in events(out, "evaluated")]
    assert held_out[-1] < held_out[0]
    assert relative_difference(logits(ours), untrained) > 1e-3

    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), out)
    assert relative_difference(logits(peft_model), logits(ours)) <= AGREE

    measured = lora("eval", "--adapter", out, "--data", rows, "--json").json
    assert measured["adapter"]["loss"] < measured["base"]["loss"]

    lora("merge", "--adapter", out)
    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    assert relative_difference(logits(merged), logits(ours)) <= AGREE

    again = lora("eval", "--base", out / "merged", "--data", rows, "--json").json
    assert again["base"]["loss"] == pytest.approx(measured["adapter"]["loss"], rel=1e-6)
    assert hashes(base) == before
