"""Frozen layers of every storage, and adapters of every variant: the table over which the laws are tested."""

from collections.abc import Callable
from math import prod

import packed
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.init import INITS
from lora_cli.lora.inject import inject, lora_layers, trained_beside

IN, OUT, PATH = 64, 96, "proj"

VARIANTS: dict[str, dict] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora+rslora": {"use_dora": True, "use_rslora": True},
    "patterns": {"rank_pattern": {PATH: 2}, "alpha_pattern": {PATH: 5}},
    "rslora+patterns": {"use_rslora": True, "rank_pattern": {PATH: 2}, "alpha_pattern": {PATH: 5}},
}


class Holder(nn.Module):
    """A model with one linear layer, at `proj`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.proj = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def _linear(W: Tensor, bias: Tensor) -> nn.Module:
    layer = nn.Linear(IN, OUT)
    layer.weight.data, layer.bias.data = W, bias
    return layer


def _conv1d(W: Tensor, bias: Tensor) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(OUT, IN)
    layer.weight.data, layer.bias.data = W.T.contiguous(), bias
    return layer


def _linear4bit(W: Tensor, bias: Tensor) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(IN, OUT, compute_dtype=W.dtype, compress_statistics=True, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(W, requires_grad=False, compress_statistics=True, quant_type="nf4")
    layer.bias.data = bias
    return layer.to("cpu")


def _linear8bit(W: Tensor, bias: Tensor) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(W, requires_grad=False, has_fp16_weights=False)
    layer.bias.data = bias
    return layer.to("cpu")


def _torchao(W: Tensor, bias: Tensor) -> nn.Module:
    """Int8, a weight alone: a plain layer whose weight is a tensor of torchao's."""
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    layer = _linear(W, bias)
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    return layer.requires_grad_(False)


def _embedding(W: Tensor, bias: Tensor) -> nn.Module:
    return nn.Embedding.from_pretrained(W.T.contiguous())


def _convolution(kind: type, kernel: tuple[int, ...], **settings) -> Callable[[Tensor, Tensor], nn.Module]:
    """With IN weights for each of OUT channels."""

    def make(W: Tensor, bias: Tensor) -> nn.Module:
        layer = kind(IN // prod(kernel), OUT, kernel, **settings)
        layer.weight.data, layer.bias.data = W.view(layer.weight.shape), bias
        return layer

    return make


# By the class name of the row in `lora_cli/lora/weights.py`
MAKERS: dict[str, Callable[[Tensor, Tensor], nn.Module]] = {
    "Linear": _linear,
    "Conv1D": _conv1d,
    "Linear4bit": _linear4bit,
    "Linear8bitLt": _linear8bit,
    "TorchAOBaseTensor": _torchao,
    **packed.LAYERS,
    "Embedding": _embedding,
    "Conv1d": _convolution(nn.Conv1d, (4,), stride=2, padding=1),
    "Conv2d": _convolution(nn.Conv2d, (2, 2), stride=(2, 1), padding=(0, 1)),
    "Conv3d": _convolution(nn.Conv3d, (2, 1, 2), stride=(1, 1, 2), padding=1),
}
CONVOLUTIONS = {"Conv1d": (9,), "Conv2d": (6, 5), "Conv3d": (3, 2, 4)}  # and the sides of what they see


def frozen(storage: str, *, dtype: torch.dtype = torch.float32) -> Holder:
    """A model with one frozen layer of this storage; the same weights at every call."""
    generator = torch.Generator().manual_seed(7)
    W = torch.randn(OUT, IN, generator=generator) / IN**0.5
    bias = torch.randn(OUT, generator=generator)
    return Holder(MAKERS[storage](W.to(dtype), bias.to(dtype))).eval()


def config_of(variant: str, **settings) -> LoRAConfig:
    return LoRAConfig(**{"r": 4, "lora_alpha": 6, "target_modules": (PATH,)} | VARIANTS[variant] | settings)


def with_adapter(storage: str, variant: str, init: str = "default", *, dtype: torch.dtype = torch.float32) -> Holder:
    """The model with an adapter that has not been trained."""
    model = frozen(storage, dtype=dtype)
    inject(model, config_of(variant), [PATH], init=INITS[init], seed=3)
    return model


def trained(storage: str, variant: str, init: str = "default", *, dtype: torch.dtype = torch.float32) -> Holder:
    """The model with an adapter whose update is of the size of the base's own output, as if trained for long."""
    model = with_adapter(storage, variant, init, dtype=dtype)
    randomize(model)
    return model


def randomize(model: nn.Module, *, size: float = 0.3, seed: int = 11) -> None:
    """Move A, B and magnitude, and what is trained beside them, away from where they start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for beside in trained_beside(model).values():
            for parameter in filter(lambda p: p.requires_grad, beside.parameters()):
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
        for layer in lora_layers(model).values():
            for factor in (layer.lora_A, layer.lora_B):
                factor.add_(size * torch.randn(factor.shape, generator=generator))
            if layer.magnitude is not None:
                layer.magnitude.mul_(0.5 + torch.rand(layer.magnitude.shape, generator=generator))


def inputs(storage: str = "Linear", *, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a layer of this storage takes."""
    generator = torch.Generator().manual_seed(5)
    if storage == "Embedding":
        return torch.randint(IN, (5, 3), generator=generator)
    if storage in CONVOLUTIONS:
        channels = frozen(storage).proj.in_channels
        return torch.randn(2, channels, *CONVOLUTIONS[storage], generator=generator).to(dtype)
    return torch.randn(5, 3, IN, generator=generator).to(dtype)


def acting(storage: str, W: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """What a layer of this storage gives for x if its dense weight is W [out, in]."""
    if storage == "Embedding":
        return F.embedding(x, W.T)
    if storage not in CONVOLUTIONS:
        return F.linear(x, W, bias)
    layer = frozen(storage).proj.float()
    return layer._conv_forward(x, W.unflatten(1, layer.weight.shape[1:]), bias)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest entry: the measure of the contract, part 5."""
    return ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()
