"""How A and B start: one function each, (layer, generator) -> None.

A start is a property of a run, not of the adapter: what is saved is always a plain adapter of the unchanged base.
"""

from collections.abc import Callable
from math import sqrt

import torch
from torch import Generator, Tensor, nn

from lora_cli.lora.layer import LoRALayer
from lora_cli.lora.weights import EMBEDDING

Init = Callable[[LoRALayer, Generator], None]


def kaiming(layer: LoRALayer, generator: Generator) -> None:
    """A uniform as in nn.Linear, B zero: what loralib and PEFT do."""
    A = torch.empty(layer.lora_A.shape)
    nn.init.kaiming_uniform_(A.view(-1, A.shape[-1]), a=sqrt(5), generator=generator)
    _begin_at_random(layer, A, generator)


def gaussian(layer: LoRALayer, generator: Generator) -> None:
    """A normal with deviation 1/r, B zero (Hu et al. 2021, section 4.1, with PEFT's deviation)."""
    A = torch.empty(layer.lora_A.shape).normal_(std=1 / layer.r, generator=generator)
    _begin_at_random(layer, A, generator)


def pissa(layer: LoRALayer, generator: Generator) -> None:
    """The principal singular directions of W: scale · B A is its best rank-r part (Meng et al. 2024, section 3)."""
    U, S, Vt = torch.linalg.svd(layer.dense().detach().float(), full_matrices=False)
    r = _rank_within_width(layer, S.shape[-1])
    root = (S[..., :r] / layer.scale).sqrt()
    layer.begin_at(root.unsqueeze(-1) * Vt[..., :r, :], U[..., :r] * root.unsqueeze(-2))


def olora(layer: LoRALayer, generator: Generator) -> None:
    """The leading part of W's QR decomposition: B orthonormal, A upper triangular (Büyükakyüz 2024, section 3)."""
    Q, R = torch.linalg.qr(layer.dense().detach().float())
    r = _rank_within_width(layer, R.shape[-2])
    layer.begin_at(R[..., :r, :], Q[..., :r])


def _begin_at_random(layer: LoRALayer, A: Tensor, generator: Generator) -> None:
    """A and a zero B; of an embedding a zero A and a normal B, as loralib and PEFT do: A's columns are a row for each
    token there, and one that never occurs stays zero. An A that is not trained must not be zero, there either."""
    B = torch.zeros(layer.lora_B.shape)
    if layer.frozen.kind == EMBEDDING and layer.lora_A.requires_grad:
        A, B = torch.zeros_like(A), B.normal_(generator=generator)
    layer.begin_at(A, B)


def _rank_within_width(layer: LoRALayer, width: int) -> int:
    if layer.r > width:
        raise ValueError(f"a rank of {layer.r} has no {layer.r} directions of a weight of width {width} to start from")
    return layer.r


INITS: dict[str, Init] = {"default": kaiming, "gaussian": gaussian, "pissa": pissa, "olora": olora}
