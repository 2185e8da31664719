"""LoRA on experts: transformers keeps the weights of a layer's experts in one parameter, [experts, out, in].

    x W_eᵀ + scale · (x A_eᵀ) B_eᵀ        A: [experts, r, in]   B: [experts, out, r]

for the rows x that are routed to expert e. No W_e + scale · B_e A_e is ever made: the module of experts, whichever way it
computes, finds in the place of its parameter an object that multiplies as the sum would. gpt-oss has its experts as
[in, out]; here they are turned. PEFT's `target_parameters`, its ParamWrapper, builds the sum of all experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_cli.kernels.lora_linear import lora_linear
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.layer import LoRALayer
from lora_cli.lora.stand_in import StandIn
from lora_cli.lora.weights import Weight

ALIGNED_BYTES = 16  # of a row that grouped products on a GPU read


class LoRAExpertWeight(LoRALayer):
    """The update of one of the parameters. It stands in a LoRAExperts, under the parameter's name.

    There is no dropout: x is not at hand where a weight is changed, and each expert has its own rows of x.
    """

    def acting(self) -> "Sum":
        """What multiplies in the place of the parameter."""
        W = self.dense()
        A, B = (factor.to(W.dtype) for factor in self.factors())
        return Sum(W, A, B, self.scale, turned=self.frozen.transposed)


class LoRAExperts(StandIn):
    """Takes the place of a module of experts."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def add(self, weight: Weight, config: LoRAConfig) -> LoRAExpertWeight:
        """Raises ValueError for DoRA."""
        if config.use_dora:
            raise ValueError(
                "PEFT's format has no magnitudes for experts, so that nothing could read it with `use_dora`"
            )
        layer = LoRAExpertWeight(weight, config)
        setattr(self, weight.parameter, layer)
        return layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layers = {name: layer for name, layer in self.named_children() if isinstance(layer, LoRAExpertWeight)}
        acting = {name: layer.acting() for name, layer in layers.items() if layer.enabled}
        return _with(self.base, acting)(*args, **kwargs)


def _with(module: nn.Module, attributes: dict[str, object]) -> nn.Module:
    """A view of the module that has these attributes instead of its own; the module stays what it is."""
    view = object.__new__(type(module))
    view.__dict__ = module.__dict__ | attributes
    return view


@dataclass(frozen=True, eq=False)
class Sum:
    """W + scale · B A [..., out, in] as a factor of products, `turned` [..., in, out]: of several experts, or of one.

    What the experts of transformers do with a weight is to choose of it, to turn it, and to multiply by it. In all else
    that torch knows, the sum itself takes its place.
    """

    W: Tensor
    A: Tensor
    B: Tensor
    scale: float
    turned: bool = False

    def __getattr__(self, name: str) -> Any:
        """dtype, device, data_ptr …: as of the weight."""
        return getattr(self.W, name)

    def __getitem__(self, chosen: Any) -> "Sum":
        if isinstance(chosen, Tensor) and chosen.ndim == 0:
            chosen = int(chosen)  # a view of one expert, where an index in a tensor would copy it
        return replace(self, W=self.W[chosen], A=self.A[chosen], B=self.B[chosen])

    def transpose(self, first: int, second: int) -> "Sum":
        if {first % self.W.ndim, second % self.W.ndim} != {self.W.ndim - 2, self.W.ndim - 1}:
            raise NotImplementedError("a weight is turned on its last two sides alone")
        return replace(self, turned=not self.turned)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return _matmul(x, self)

    def whole(self) -> Tensor:
        """The sum, in the form that is asked for."""
        merged = self.W + self.scale * (self.B @ self.A)
        return merged.mT if self.turned else merged

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        product, named = PRODUCTS.get(function), kwargs or {}
        found = product(*args, **named) if product else NotImplemented
        if found is not NotImplemented:
            return found
        return function(*map(_plain, args), **{name: _plain(value) for name, value in named.items()})


def _plain(argument: object) -> object:
    return argument.whole() if isinstance(argument, Sum) else argument


def _linear(x: Tensor, weight: Sum, bias: Tensor | None = None) -> Tensor:
    """x [rows, in], one expert"""
    if weight.turned or weight.W.ndim > 2:
        return NotImplemented
    return lora_linear(x, weight.W, bias, weight.A, weight.B, weight.scale)


def _matmul(x: Tensor, weight: Sum) -> Tensor:
    """x [rows, in] @ [in, out], one expert"""
    if not isinstance(weight, Sum) or not weight.turned:
        return NotImplemented
    return _linear(x, replace(weight, turned=False))


def _bmm(left: Tensor | Sum, right: Tensor | Sum) -> Tensor:
    """A row for each of the experts that are chosen: [rows, 1, in] @ [rows, in, out], or the weight on the left."""
    if isinstance(left, Sum):
        return NotImplemented if left.turned else torch.bmm(left.W, right) + left.scale * (left.B @ (left.A @ right))
    if not right.turned:
        return NotImplemented
    return torch.bmm(left, right.W.mT) + right.scale * (left @ right.A.mT @ right.B.mT)


def _grouped_mm(x: Tensor, weight: Sum, *, offs: Tensor, **others: Any) -> Tensor:
    """x [rows, in], in the order of the experts, which have the rows up to `offs` each."""
    if not isinstance(weight, Sum) or not weight.turned or any(other is not None for other in others.values()):
        return NotImplemented
    more = -weight.A.shape[1] % (ALIGNED_BYTES // x.dtype.itemsize)
    A, B = F.pad(weight.A, (0, 0, 0, more)), F.pad(weight.B, (0, more))
    thin = F.grouped_mm(x, A.mT, offs=offs) * weight.scale
    return F.grouped_mm(x, weight.W.mT, offs=offs) + F.grouped_mm(thin, B.mT, offs=offs)


# What experts multiply by their weights with
PRODUCTS: dict[Callable, Callable[..., Tensor]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.bmm: _bmm,
    F.grouped_mm: _grouped_mm,
    torch._grouped_mm: _grouped_mm,  # which F.grouped_mm calls
}
