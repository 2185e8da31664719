"""QLoRA and LLM.int8 through the command line, on the CPU."""

import logging

import pytest
import torch
from layers import relative_difference
from peft import PeftModel
from running import events, hashes, write_rows
from transformers import AutoModelForCausalLM

from lora_cli.lora.peft_format import load_adapter
from lora_cli.models.base import Base
from lora_cli.models.load import load_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[5, 17, 200, 31, 8, 90, 41]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize(
    "changed", [{}, {"lora.use_dora": True}, {"lora.init": "pissa"}], ids=["plain", "dora", "pissa"]
)
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantized_base_trains_evaluates_and_its_adapter_merges_into_the_whole_one(
    quantize, changed, lora, recipe, tiny_llama, tmp_path
):
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    before, out = hashes(tiny_llama), tmp_path / "out"
    file = recipe({"model.quantize": quantize, "data.eval": "25%", "training.max_steps": 6} | changed)

    lora("train", file)
    first, last = events(out, "evaluated")
    assert last["loss"] < first["loss"]

    measured = lora("eval", file, "--json").json
    assert measured["base"]["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert measured["adapter"]["loss"] == pytest.approx(last["loss"], rel=1e-5)

    quantized = load_model(Base("tiny", tiny_llama), dtype=torch.float32, quantize=quantize)
    peft_model = PeftModel.from_pretrained(quantized, out)
    ours = load_model(Base("tiny", tiny_llama), dtype=torch.float32, quantize=quantize)
    load_adapter(out).inject_into(ours)
    assert relative_difference(logits(peft_model), logits(ours)) <= 2e-6

    lora("merge", "--adapter", out, "--base-grid", "original")
    whole = load_model(Base("tiny", tiny_llama), dtype=torch.float32)
    load_adapter(out).inject_into(whole)
    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    assert relative_difference(logits(merged), logits(whole)) <= 2e-6
    assert hashes(tiny_llama) == before


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_evaluating_on_the_way_does_not_change_what_a_quantized_run_learns(quantize, lora, recipe, tmp_path):
    """bitsandbytes' repacking in evaluation would (AVX512-BF16), and so would a moved int8 weight."""
    settings = {"model.quantize": quantize, "data.eval": "25%"}
    lora("train", recipe(settings), "--out", tmp_path / "plain")

    lora("train", recipe(settings | {"training.eval_steps": 1}), "--out", tmp_path / "watched")

    curves = [[event["loss"] for event in events(tmp_path / name, "step")] for name in ("plain", "watched")]
    assert curves[0] == curves[1]


def test_a_quantized_run_resumes_to_the_same_bytes(lora, recipe, tmp_path):
    import shutil

    from running import adapter_bytes

    file = recipe({"model.quantize": "nf4", "training.save_steps": 2, "lora.dropout": 0.1})
    lora("train", file)
    straight = adapter_bytes(tmp_path / "out")

    shutil.rmtree(tmp_path / "out/checkpoints/step-0000004")
    lora("train", file, "--resume")

    assert adapter_bytes(tmp_path / "out") == straight


def test_rows_can_be_measured_on_the_quantized_base_alone(lora, recipe, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")

    plain, quantized = (
        lora("eval", recipe({"model.quantize": quantize}), "--adapter", out, "--data", rows, "--json").json["base"][
            "loss"
        ]
        for quantize, out in [(q, trained(lora, recipe, tmp_path)) for q in ("none", "nf4")]
    )

    assert plain != quantized
    assert plain == pytest.approx(quantized, rel=0.05)


def trained(lora, recipe, tmp_path):
    if not (tmp_path / "out").exists():
        lora("train", recipe())
    return tmp_path / "out"
