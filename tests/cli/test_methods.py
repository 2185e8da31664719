"""Every method on its whole way through the command line: recipe, training, PEFT, evaluation, merge, resumption."""

import logging

import pytest
import torch
from layers import relative_difference
from peft import PeftModel
from running import adapter_bytes, events, hashes, resumed_after
from transformers import AutoModelForCausalLM

from lora_cli.lora.peft_format import load_adapter
from lora_cli.models.base import Base
from lora_cli.models.load import load_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[5, 17, 200, 31, 8, 90, 41]])
RUN = {"data.eval": "25%", "training.save_steps": 2, "lora.dropout": 0.1, "training.weight_decay": 0.01}

METHODS: dict[str, dict] = {
    "rsLoRA": {"lora.use_rslora": True},
    "DoRA": {"lora.use_dora": True},
    "LoRA+": {"training.loraplus_lr_ratio": 4, "training.learning_rate": 0.005},
    "LoRA-FA": {"lora.freeze_A": True},
    "LoRA-FA over PiSSA": {"lora.freeze_A": True, "lora.init": "pissa"},
    "gaussian": {"lora.init": "gaussian"},
    "PiSSA": {"lora.init": "pissa"},
    "OLoRA": {"lora.init": "olora"},
    "patterns": {"lora.rank_pattern": {"q_proj": 2}, "lora.alpha_pattern": {"v_proj": 3}, "lora.layers": [1]},
}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("method", METHODS)
def test_a_method_goes_all_the_way(method, lora, recipe, tiny_llama, tmp_path):
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    before, out = hashes(tiny_llama), tmp_path / "out"
    file = recipe(RUN | METHODS[method])
    quantize = METHODS[method].get("model.quantize", "none")

    lora("train", file)
    first, last = events(out, "evaluated")
    assert last["loss"] < first["loss"]

    straight = adapter_bytes(out)
    resumed_after(2, out, file, lora)
    assert adapter_bytes(out) == straight

    measured = lora("eval", file, "--json").json
    assert measured["base"]["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert measured["adapter"]["loss"] == pytest.approx(last["loss"], rel=1e-5)

    ours = load_model(Base("tiny", tiny_llama), dtype=torch.float32, quantize=quantize)
    load_adapter(out).inject_into(ours)
    peft_model = PeftModel.from_pretrained(
        load_model(Base("tiny", tiny_llama), dtype=torch.float32, quantize=quantize), out
    )
    assert relative_difference(logits(peft_model), logits(ours)) <= 2e-6

    lora("merge", "--adapter", out)
    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    assert relative_difference(logits(merged), logits(ours)) <= 2e-6
    assert hashes(tiny_llama) == before


def test_with_a_frozen_A_only_B_has_moved(lora, recipe, tmp_path):
    """LoRA-FA (Zhang et al. 2023, section 3.1): A is what it was at the start, and is in the adapter's file."""
    lora("train", recipe({"lora.freeze_A": True, "training.save_steps": 1}))

    early, late = (load_adapter(tmp_path / "out" / name) for name in ("checkpoints/step-0000003", "."))
    started = events(tmp_path / "out", "started")[0]

    assert started["parameters"] == sum(factors.B.numel() for factors in late.layers.values())
    for path, factors in late.layers.items():
        assert factors.A.any()
        assert torch.equal(factors.A, early.layers[path].A)
        assert not torch.equal(factors.B, early.layers[path].B)


def test_loraplus_tells_the_rate_of_A_and_the_page_and_card_both(lora, recipe, tmp_path):
    lora("train", recipe({"training.loraplus_lr_ratio": 16, "training.lr_scheduler": "constant"}))

    assert {event["lr"] for event in events(tmp_path / "out", "step")} == {0.02}
    assert "| learning rate | 0.02 (B: 0.32), constant |" in (tmp_path / "out/README.md").read_text()
    assert "training.loraplus_lr_ratio" in (tmp_path / "out/report.html").read_text()
