"""The dense weight of a frozen layer, whatever it is stored as: one row a storage.

Every weight is a matrix [out, in] here, or several of them: an embedding's is its table turned, a convolution's has a
column for each input channel and place of its kernel, and experts that share one parameter have a matrix each.

Everything that needs a weight (DoRA's norm, PiSSA, the budget, a merge in memory) asks the row, so every variant works
on every storage. Rows are found by class name, which keeps transformers, bitsandbytes and other packages out of the
imports: that of the layer, or that of its weight (torchao's layers are plain ones, with tensors of its own classes).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from lora_cli.errors import ModelError, Problem
from lora_cli.lora.packed import read_awq, read_gptq
from lora_cli.lora.shards import is_sharded

LINEAR, EMBEDDING, CONVOLUTION, EXPERTS = "linear", "embedding", "convolution", "experts"


@dataclass(frozen=True)
class Storage:
    """How a layer keeps its weight: `shape` is (out, in), `read` gives the dense [out, in] weight, `parameter` is where
    what is stored lies."""

    class_name: str
    shape: Callable[[nn.Module], tuple[int, int]]
    read: Callable[[nn.Module], Tensor]
    kind: str = LINEAR  # which layer class goes around it
    transposed: bool = False  # the parameter, and the file, hold [in, out]
    quantised: bool = False
    parameter: str = "weight"


@dataclass(frozen=True)
class Weight:
    """A weight that an adapter can change: `module`'s own, or its `parameter`, which holds `count` matrices."""

    module: nn.Module
    kind: str
    shape: tuple[int, int]  # (out, in)
    transposed: bool = False
    parameter: str = "weight"
    count: int | None = None

    @property
    def tensor(self) -> Tensor:
        """As it is stored."""
        return getattr(self.module, self.parameter)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)

    @property
    def numel(self) -> int:
        """Of the weight that is stored, or that is stored in fewer bits."""
        return prod(self.shape) * (self.count or 1)

    def dense(self) -> Tensor:
        """[out, in], of experts [count, out, in]: dequantised if need be; a view of the parameter where that is possible."""
        if self.kind != EXPERTS:
            return dense(self.module)
        return self.tensor.mT if self.transposed else self.tensor

    @property
    def kernel(self) -> tuple[int, ...]:
        """Of a convolution: the sizes of its kernel."""
        return tuple(self.module.kernel_size) if self.kind == CONVOLUTION else ()


def weights_of(model: nn.Module) -> dict[str, Weight]:
    """Every weight that an adapter can change, in the model's order: by the module's path, of experts by the parameter's."""
    return {path: weight for name, module in model.named_modules() for path, weight in _weights(name, module)}


def _weights(path: str, module: nn.Module) -> Iterator[tuple[str, Weight]]:
    if storage := storage_of(module):
        yield path, Weight(module, storage.kind, storage.shape(module), storage.transposed, storage.parameter)
    elif "expert" in type(module).__name__.lower():
        # transformers' own flag for gpt-oss, whose experts are [in, out]
        transposed = getattr(module, "is_transposed", False)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3:
                count, *sides = parameter.shape
                shape = tuple(sides[::-1] if transposed else sides)
                yield f"{path}.{name}", Weight(module, EXPERTS, shape, transposed, name, count)


def storage_of(layer: nn.Module) -> Storage | None:
    """The row for a layer, or None when it has no weight that we know."""
    kinds = (type(layer), type(layer._parameters.get("weight")))
    names = {cls.__name__ for kind in kinds for cls in kind.__mro__}
    return next((row for row in STORAGES if row.class_name in names), None)


def fan_in_fan_out(weights: Iterable[Weight]) -> bool:
    """PEFT's word for what GPT-2 has: linear layers whose weight is [in, out]."""
    return any(weight.transposed and weight.kind == LINEAR for weight in weights)


def is_quantised(layer: nn.Module) -> bool:
    storage = storage_of(layer)
    return storage is not None and storage.quantised


def dense(layer: nn.Module) -> Tensor:
    """[out, in]: the layer's weight, dequantised if need be; a view of the parameter where that is possible."""
    storage = storage_of(layer)
    if storage is None:
        raise ValueError(f"{type(layer).__name__} has no weight of a known storage")
    return storage.read(layer)


def frozen_matrix(layer: nn.Module) -> Tensor | None:
    """[out, in]: the weight of a frozen layer that does no more than multiply by it; None where only the layer knows how."""
    storage = storage_of(layer)
    if storage is None or storage.quantised or type(layer).__name__ != storage.class_name:
        return None
    weight = storage.read(layer)
    return None if weight.requires_grad or is_sharded(weight) else weight


def stored_in(layer: nn.Module) -> list[Tensor]:
    """The plain tensors that a layer's parameters are made of, and what else holds its weight: buffers, and scales."""
    others = [*layer.buffers(recurse=False), *_scales(layer)] if is_quantised(layer) else []
    return [inner for tensor in (*layer.parameters(recurse=False), *others) for inner in _plain(tensor)]


def _scales(layer: nn.Module) -> list[Tensor]:
    """What bitsandbytes keeps beside a weight, in no parameter and no buffer."""
    weight = layer._parameters.get("weight")
    if (state := getattr(weight, "quant_state", None)) is not None:
        twice = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
        return [state.absmax, state.code, *twice]
    moved = getattr(getattr(layer, "state", None), "SCB", None)  # by the first forward
    scales = getattr(weight, "SCB", None) if moved is None else moved
    return [] if scales is None else [scales]


def _plain(tensor: Tensor) -> list[Tensor]:
    """Itself, or the tensors inside of one of torchao's."""
    if is_sharded(tensor) or not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [inner for name in names for inner in _plain(getattr(tensor, name))]


def check_gradients(model: nn.Module) -> None:
    """Raise ModelError for quantised layers through which no gradient passes: what stands before them would not learn.

    One layer of each storage is tried, with a random input.
    """
    keep_unpacked(model)
    tried = set()
    for path, weight in weights_of(model).items():
        kind = (type(weight.module), type(weight.tensor))
        if not is_quantised(weight.module) or kind in tried or weight.tensor.device.type == "meta":
            continue
        tried.add(kind)
        if not _passes_gradients(weight):
            what = f"no gradient passes through {path}, which is quantised ({kind[1].__name__} in a {kind[0].__name__})"
            fix = "give a base that quantises weights alone, and not what they are multiplied with, or the 16-bit original"
            raise ModelError(Problem(what, fix=fix))


def _passes_gradients(weight: Weight) -> bool:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):  # some layers take one alone
        x = torch.ones(2, weight.shape[1], dtype=dtype, device=weight.tensor.device, requires_grad=True)
        try:
            (gradient,) = torch.autograd.grad(weight.module(x).float().sum(), x, allow_unused=True)
        except RuntimeError:  # of another number format, or without any way back
            continue
        return gradient is not None and bool(gradient.any())
    return False


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


def _channels(layer: nn.Module) -> tuple[int, int]:
    return layer.out_channels, layer.in_channels // layer.groups * prod(layer.kernel_size)


def _read_kernel(layer: nn.Module) -> Tensor:
    return layer.weight.flatten(1)


def _read_4bit(layer: nn.Module) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def _read_8bit(layer: nn.Module) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    # The first forward moves weight and scales from the parameter into the layer's state.
    in_state = layer.state.CB is not None
    weight, scales = (layer.state.CB, layer.state.SCB) if in_state else (layer.weight.data, layer.weight.SCB)
    return int8_vectorwise_dequant(weight, scales)


# Layers of gptqmodel, and of the packages before it
AWQ = ("AWQuantLinear", "WQLinear_GEMM")
GPTQ = ("GPTQQuantLinear", "QuantLinear")

# The quantised layers inherit from nn.Linear, so they stand before it.
STORAGES = (
    Storage("Linear4bit", _features, _read_4bit, quantised=True),
    Storage("Linear8bitLt", _features, _read_8bit, quantised=True),
    Storage("TorchAOBaseTensor", _features, lambda layer: layer.weight.dequantize(), quantised=True),
    Storage("HQQLinear", _features, lambda layer: layer.dequantize(), quantised=True, parameter="W_q"),
    *(Storage(name, _features, read_awq, quantised=True, parameter="qweight") for name in AWQ),
    *(Storage(name, _features, read_gptq, quantised=True, parameter="qweight") for name in GPTQ),
    Storage("Conv1D", lambda layer: (layer.nf, layer.nx), lambda layer: layer.weight.T, transposed=True),
    Storage("Linear", _features, lambda layer: layer.weight),
    Storage(
        "Embedding",
        lambda layer: (layer.embedding_dim, layer.num_embeddings),
        lambda layer: layer.weight.T,
        kind=EMBEDDING,
        transposed=True,
    ),
    Storage("Conv1d", _channels, _read_kernel, kind=CONVOLUTION),
    Storage("Conv2d", _channels, _read_kernel, kind=CONVOLUTION),
    Storage("Conv3d", _channels, _read_kernel, kind=CONVOLUTION),
)
