"""The dense weight of a frozen layer, whatever it is stored as: one row a storage.

Everything that needs a weight (DoRA's norm, PiSSA, the budget, a merge in memory) asks the row, so every variant works
on every storage. Rows are found by class name, which keeps transformers and bitsandbytes out of the imports.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Storage:
    """How a layer class keeps its weight: `shape` is (out, in), `read` gives the dense [out, in] weight."""

    class_name: str
    shape: Callable[[nn.Module], tuple[int, int]]
    read: Callable[[nn.Module], Tensor]
    transposed: bool = False  # the file holds [in, out]: PEFT's fan_in_fan_out
    quantised: bool = False


def storage_of(layer: nn.Module) -> Storage | None:
    """The row for a layer, or None when it is no linear layer that we know."""
    names = {cls.__name__ for cls in type(layer).__mro__}
    return next((row for row in STORAGES if row.class_name in names), None)


def is_quantised(layer: nn.Module) -> bool:
    storage = storage_of(layer)
    return storage is not None and storage.quantised


def dense(layer: nn.Module) -> Tensor:
    """[out, in]: the layer's weight, dequantised if need be; a view of the parameter where that is possible."""
    storage = storage_of(layer)
    if storage is None:
        raise ValueError(f"{type(layer).__name__} is no linear layer with a known storage")
    return storage.read(layer)


def keep_unpacked(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place on processors with AVX512-BF16.

    An evaluation there would repack them, and every later gradient and merge would silently be wrong (bitsandbytes
    issue 2078).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _features(layer: nn.Module) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def _read_4bit(layer: nn.Module) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def _read_8bit(layer: nn.Module) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    # The first forward moves weight and scales from the parameter into the layer's state.
    in_state = layer.state.CB is not None
    weight, scales = (layer.state.CB, layer.state.SCB) if in_state else (layer.weight.data, layer.weight.SCB)
    return int8_vectorwise_dequant(weight, scales)


# The quantised layers inherit from nn.Linear, so they stand before it.
STORAGES = (
    Storage("Linear4bit", _features, _read_4bit, quantised=True),
    Storage("Linear8bitLt", _features, _read_8bit, quantised=True),
    Storage("Conv1D", lambda layer: (layer.nf, layer.nx), lambda layer: layer.weight.T, transposed=True),
    Storage("Linear", _features, lambda layer: layer.weight),
)
