"""How linear layers are stored in fewer than 16 bits, by formula and without torch: as `model.quantize` makes them, or as
the `quantization_config` of a base says that they are on disk.

    bytes = codes + groups · (scale + zero) + tables         a group of weights, or a row, shares a scale and a zero

tests/budget/test_quantised.py holds every row to the tensors of real layers. What is no linear layer (embeddings, norms,
experts in one parameter) and the head stay as they are.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lora_cli.budget.shapes import Config, Linear


@dataclass(frozen=True)
class Quantised:
    """How a linear layer is stored; `group` weights share a scale, a whole row where it is None."""

    name: str  # as a table has it
    bits: float  # of a weight's code
    group: int | None
    scale_bits: float
    zero_bits: float = 0
    bytes_an_input: int = 0  # for each feature that is read
    bytes_a_layer: int = 0
    holds_inputs: bool = False  # of a layer, outside of what autograd keeps, so that checkpointing doesn't free them
    left_out: tuple[str, ...] = ()  # names of linears that stay as they are, by their beginning or end

    @property
    def bits_a_weight(self) -> float:
        """With what a group shares; a row's share is next to nothing."""
        return self.bits + ((self.scale_bits + self.zero_bits) / self.group if self.group else 0)

    def holds(self, linear: Linear) -> bool:
        """Whether the layer is stored so; heads are for the caller to leave out."""
        path = linear.path
        return not any(path.startswith(f"{name}.") or path.endswith(name) for name in self.left_out)

    def bytes_of(self, linear: Linear) -> int:
        """Of its weight, without the bias."""
        groups = math.ceil(linear.weights / self.group) if self.group else linear.out_features
        beside = math.ceil(groups * (self.scale_bits + self.zero_bits) / 8)
        of_layer = self.bytes_an_input * linear.in_features + self.bytes_a_layer
        return math.ceil(linear.weights * self.bits / 8) + beside + of_layer


# 4 bits a weight, a scale a block of 64 (Dettmers et al. 2023, section 3); quantised twice, that has 8 bits, and 256 of
# them share a 32-bit scale. Each layer holds the tables of its codes
_BLOCK, _CODE_TABLE, _SCALE_TABLE = 64, 4 * 16, 4 * 256 + 4
NF4 = Quantised("nf4", 4, _BLOCK, scale_bits=8 + 32 / 256, bytes_a_layer=_CODE_TABLE + _SCALE_TABLE)
NF4_ONCE = replace(NF4, scale_bits=32, bytes_a_layer=_CODE_TABLE)
INT8 = Quantised("int8", 8, None, scale_bits=32, holds_inputs=True)
QUANTIZE: Mapping[str, Quantised | None] = {"none": None, "nf4": NF4, "int8": INT8}  # `model.quantize`


def quantised_by(config: Config) -> Quantised | None:
    """What a config.json says of its base's files; None where they hold plain numbers, or are quantised in a way without
    a formula, which `unknown_method` names."""
    found = config.get("quantization_config")
    if not isinstance(found, Mapping):
        return None
    method = METHODS.get(_method(found))
    half = 32 if (config.get("dtype") or config.get("torch_dtype")) == "float32" else 16
    left_out = found.get("modules_to_not_convert") or found.get("llm_int8_skip_modules") or found.get("skip_modules")
    try:
        quantised = method(found, half) if method else None
        return quantised and replace(quantised, left_out=tuple(map(str, left_out or ())))
    except (KeyError, TypeError, AttributeError):  # not as its method writes it
        return None


def unknown_method(config: Config) -> str | None:
    """The name of a way to quantise that has no formula here."""
    found = config.get("quantization_config")
    return _method(found) if isinstance(found, Mapping) and quantised_by(config) is None else None


def _method(found: Mapping[str, Any]) -> str:
    """Perhaps as transformers' own enumeration has it, whose members are text too."""
    named = found.get("quant_method")
    return named if isinstance(named, str) else "bitsandbytes"


def _bitsandbytes(found: Mapping[str, Any], half: int) -> Quantised | None:
    if found.get("load_in_8bit"):
        return INT8
    kind = NF4 if found.get("bnb_4bit_use_double_quant") else NF4_ONCE
    return replace(kind, name=str(found.get("bnb_4bit_quant_type", "fp4"))) if found.get("load_in_4bit") else None


def _gptq(found: Mapping[str, Any], half: int) -> Quantised:
    """Packed along the input; each input has the number of its group."""
    bits = found["bits"]
    return Quantised(f"GPTQ {bits} bit", bits, _group(found), scale_bits=16, zero_bits=bits, bytes_an_input=4)


def _awq(found: Mapping[str, Any], half: int) -> Quantised:
    bits = found.get("bits") or found.get("w_bit") or 4
    return Quantised(f"AWQ {bits} bit", bits, _group(found), scale_bits=16, zero_bits=bits)


def _hqq(found: Mapping[str, Any], half: int) -> Quantised | None:
    """Of one setting for all layers; ten codes of 3 bits share a word."""
    settings = (found.get("quant_config") or {}).get("weight_quant_params")
    if not settings:
        return None
    bits, group = settings["nbits"], settings["group_size"]
    return Quantised(f"HQQ {bits} bit", 3.2 if bits == 3 else bits, group, scale_bits=half, zero_bits=half)


def _torchao(found: Mapping[str, Any], half: int) -> Quantised | None:
    """Of one setting for all layers. Codes below 8 bits are kept in 8, but for those that a kernel of its own reads."""
    kinds = found.get("quant_type")
    kind = kinds.get("default") if isinstance(kinds, Mapping) and set(kinds) == {"default"} else None
    make = TORCHAO.get(kind["_type"]) if kind else None
    return make(kind.get("_data") or {}, half) if make else None


def _torchao_group(data: Mapping[str, Any]) -> int | None:
    granularity = data.get("granularity") or {}
    return (granularity.get("_data") or {}).get("group_size")


TORCHAO: Mapping[str, Callable[[Mapping[str, Any], int], Quantised]] = {
    "Int8WeightOnlyConfig": lambda data, half: Quantised("torchao int8", 8, _torchao_group(data), half, zero_bits=8),
    "IntxWeightOnlyConfig": lambda data, half: Quantised("torchao intx", 8, _torchao_group(data), half, zero_bits=8),
    "Float8WeightOnlyConfig": lambda data, half: Quantised("torchao fp8", 8, None, scale_bits=32),
    "Int4WeightOnlyConfig": lambda data, half: Quantised(
        "torchao int4", 4, data.get("group_size", 128), scale_bits=16, zero_bits=16
    ),
}
METHODS: Mapping[str, Callable[[Mapping[str, Any], int], Quantised | None]] = {
    "bitsandbytes": _bitsandbytes,
    "gptq": _gptq,
    "awq": _awq,
    "hqq": _hqq,
    "torchao": _torchao,
}


def _group(found: Mapping[str, Any]) -> int | None:
    size = found.get("group_size") or found.get("q_group_size") or 128
    return None if size < 0 else size
