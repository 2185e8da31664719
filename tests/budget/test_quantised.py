"""What the formulas say of a quantised layer is what its tensors are, and of a base on disk what its model holds."""

import json

import pytest
import torch
from budget.steps import peak_bytes, tiny_step
from packed import BITS, GROUP, LAYERS
from quantised_bases import STORAGES, bitsandbytes, quantised_base, torchao
from tiny import tiny_base
from torch import Tensor, nn

from lora_cli.budget.bases import measure_base
from lora_cli.budget.memory import base_bytes, compare
from lora_cli.budget.params import adapted_linears, budget_of
from lora_cli.budget.quantised import quantised_by, unknown_method
from lora_cli.budget.shapes import Linear
from lora_cli.budget.step import step_memory
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.weights import stored_in
from lora_cli.models.base import Base, read_config
from lora_cli.models.load import load_model

IN, OUT = 64, 48
CONFIGS = {
    "GPTQQuantLinear": {"quant_method": "gptq", "bits": BITS, "group_size": GROUP},
    "QuantLinear": {"quant_method": "gptq", "bits": BITS, "group_size": GROUP},
    "AWQuantLinear": {"quant_method": "awq", "bits": BITS, "group_size": GROUP},
    "WQLinear_GEMM": {"quant_method": "awq", "w_bit": BITS, "q_group_size": GROUP},
    "HQQLinear": {
        "quant_method": "hqq",
        "quant_config": {"weight_quant_params": {"nbits": BITS, "group_size": GROUP}},
        "skip_modules": ["lm_head"],
    },
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_packed_layer_has_the_bytes_that_its_config_says(name):
    layer = LAYERS[name](torch.randn(OUT, IN), torch.zeros(OUT))
    meta = [value for value in getattr(layer, "meta", {}).values() if isinstance(value, Tensor)]
    tensors = [tensor for key, tensor in layer.state_dict().items() if key != "bias"] + meta

    quantised = quantised_by({"quantization_config": CONFIGS[name]})

    assert quantised.bytes_of(Linear("proj", IN, OUT, bias=True)) == sum(tensor.nbytes for tensor in tensors)


ON_DISK = STORAGES | {
    "bitsandbytes fp4, twice": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_use_double_quant=True),
    "bitsandbytes int8 in part": lambda: bitsandbytes(load_in_8bit=True, llm_int8_skip_modules=["lm_head", "o_proj"]),
    "torchao fp8": lambda: torchao("Float8WeightOnlyConfig"),
}


@pytest.mark.parametrize("kind", ON_DISK)
def test_a_base_quantised_on_disk_is_counted_as_its_model_holds_it(kind, tmp_path):
    model = load_model(Base("tiny", quantised_base(tmp_path, ON_DISK[kind]())), dtype=torch.bfloat16)

    shape = measure_base(str(tmp_path / "base")).shape
    found = base_bytes(shape, quantised_by(shape.config))

    assert found == pytest.approx(held_bytes(model), rel=1e-3)
    assert found < base_bytes(shape)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("recompute", [0, 1, 2, "mlp"])
@pytest.mark.parametrize("kind", ["bitsandbytes nf4", "bitsandbytes fp4, twice", "bitsandbytes int8"])
def test_the_peak_beside_a_quantised_base_is_the_measured_one_within_5_percent(kind, recompute, tmp_path):
    model = load_model(Base("tiny", quantised_base(tmp_path, ON_DISK[kind]())), dtype=torch.float32)
    step = tiny_step(model, packed=True, recompute=recompute)

    predicted = step_memory(step.setup, step.batch, recompute).total

    assert predicted == pytest.approx(peak_bytes(step), rel=0.05)


def held_bytes(model: nn.Module) -> int:
    """Of every layer's tensors; positions are no weights."""
    tensors = {id(tensor): tensor for module in model.modules() for tensor in stored_in(module)}
    return sum(tensor.nbytes for tensor in tensors.values())


def test_a_base_on_disk_is_what_lora_is_compared_with(tmp_path):
    shape = on_disk(tmp_path, CONFIGS["QuantLinear"]).shape
    budget = budget_of(adapted_linears(shape, "qv"), shape.parameters, LoRAConfig(r=2, lora_alpha=2, target_modules=()))

    full, lora = compare(shape, budget)

    assert lora.name == "LoRA (GPTQ 4 bit)"
    assert lora.base_bytes == base_bytes(shape, quantised_by(shape.config)) < full.base_bytes


@pytest.mark.parametrize(
    "found", [{"quant_method": "magic"}, {"quant_method": "gptq"}, {"quant_method": "hqq", "quant_config": 3}]
)
def test_a_way_without_a_formula_is_named_and_counted_in_16_bits(found, tmp_path):
    base = on_disk(tmp_path, found)

    assert unknown_method(base.shape.config) == found["quant_method"]
    assert base_bytes(base.shape, quantised_by(base.shape.config)) == 2 * base.shape.parameters
    assert f"quantised on disk ({found['quant_method']})" in base.shape.notes[-1]


def on_disk(folder, quantization_config):
    config = read_config(tiny_base(folder / "base")) | {"quantization_config": quantization_config}
    (folder / "base" / "config.json").write_text(json.dumps(config))
    return measure_base(str(folder / "base"))
