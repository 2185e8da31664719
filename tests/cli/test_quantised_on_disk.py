"""Bases that are quantised in their own files: trained beside, measured, and merged into what they stand for."""

import json
import sys

import pytest
import torch
from layers import relative_difference
from peft import PeftModel
from quantised_bases import STORAGES, quantised_base, torchao
from running import hashes, trained_and_resumed
from tiny import tiny_base
from transformers import AutoModelForCausalLM

from lora_cli.lora.inject import lora_layers
from lora_cli.lora.peft_format import load_adapter
from lora_cli.models.base import Base
from lora_cli.models.load import load_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without"),  # which PEFT needs to merge
]

IDS = torch.tensor([[5, 17, 200, 31, 8, 90, 41]])


ROUNDED_INPUTS = ("bitsandbytes int8",)  # LLM.int8 rounds what it multiplies, too


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("method", [{}, {"lora.use_dora": True}], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_quantised_base_goes_all_the_way(storage, method, lora, recipe, tmp_path):
    base, out = quantised_base(tmp_path, STORAGES[storage]()), tmp_path / "out"
    before = hashes(base)
    file = recipe({"data.eval": "25%", "training.max_steps": 6, "training.save_steps": 2} | method, base=base)

    _, last = trained_and_resumed(file, out, lora)
    measured = lora("eval", file, "--json").json
    assert measured["adapter"]["loss"] == pytest.approx(last["loss"], rel=1e-5)

    ours = load_model(Base("tiny", base), dtype=torch.float32)
    load_adapter(out).inject_into(ours)
    theirs = PeftModel.from_pretrained(load_model(Base("tiny", base), dtype=torch.float32), out)
    assert relative_difference(logits(theirs), logits(ours)) <= 1e-5
    assert len(lora_layers(ours)) == 14

    lora("merge", "--adapter", out)
    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config")
    assert relative_difference(logits(merged), logits(ours)) <= (0.05 if storage in ROUNDED_INPUTS else 1e-5)
    assert hashes(base) == before


def test_a_quantised_base_is_not_quantised_again(lora, recipe, tmp_path):
    base = quantised_base(tmp_path, STORAGES["bitsandbytes nf4"]())

    refused = lora("train", recipe({"model.quantize": "nf4"}, base=base), code=4)

    assert "the base's are quantised already (bitsandbytes)" in refused.err
    assert "leave `model.quantize` out" in refused.err


def test_a_base_that_gives_no_gradients_is_refused_before_it_trains(lora, recipe, tmp_path):
    base = quantised_base(tmp_path, torchao("Int8DynamicActivationInt8WeightConfig"))

    refused = lora("train", recipe(base=base), code=4)

    assert "no gradient passes through model.layers.0.self_attn.q_proj" in refused.err


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_package_that_is_not_there_is_named_with_a_way_out(method, lora, recipe, tmp_path):
    if any(name in sys.modules for name in ("optimum", "gptqmodel")):
        pytest.skip("it is there")
    base = tiny_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 16, "zero_point": True}
    (base / "config.json").write_text(json.dumps(config))

    refused = lora("train", recipe(base=base), code=4)

    assert "requires" in refused.err
    assert "install what the message names, or give the 16-bit original of the base" in refused.err
