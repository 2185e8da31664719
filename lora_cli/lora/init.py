"""How A and B start: one function each, (layer, generator) -> None, or (layer, generator, given) -> None.

A start is a property of a run, not of the adapter: what is saved is always a plain adapter of the unchanged base. Where
B A is a part of the weight (PiSSA, OLoRA), it is taken off again, so that training begins at the base's function.
"""

from collections.abc import Callable
from math import sqrt

import torch
from torch import Generator, Tensor, nn

from lora_cli.lora.layer import LoRALayer
from lora_cli.lora.weights import EMBEDDING

Init = Callable[..., None]


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
    layer.begin_at(root.unsqueeze(-1) * Vt[..., :r, :], U[..., :r] * root.unsqueeze(-2), take_off=True)


def olora(layer: LoRALayer, generator: Generator) -> None:
    """The leading part of W's QR decomposition: B orthonormal, A upper triangular (Büyükakyüz 2024, section 3)."""
    Q, R = torch.linalg.qr(layer.dense().detach().float())
    r = _rank_within_width(layer, R.shape[-2])
    layer.begin_at(R[..., :r, :], Q[..., :r], take_off=True)


def orthogonal(layer: LoRALayer, generator: Generator) -> None:
    """A and B both random, with columns and rows such that B A is zero: PEFT's `orthogonal`.

    The odd rows of a random rotation [r, r] carry A, its even rows B; r is even.
    """
    *several, r, in_features = layer.lora_A.shape
    if r % 2:
        raise ValueError(f"a rank of {r} has no two halves of its directions, one for A and one for B")

    def normal(*shape: int) -> Tensor:
        return torch.empty(*several, *shape).normal_(generator=generator)

    rotation = torch.linalg.qr(normal(r, r)).Q
    A = (normal(in_features, r // 2) @ rotation[..., 0::2, :]).mT / 10
    B = (normal(layer.lora_B.shape[-2], r // 2) @ rotation[..., 1::2, :]) / 10
    layer.begin_at(A, B)


def loftq(layer: LoRALayer, generator: Generator, W: Tensor) -> None:
    """The best rank-r part of what quantising took from W [out, in]: base + scale · B A is as near to W as rank r allows.

    Li et al. 2023, "LoftQ", algorithm 1 with T = 1: more turns would quantise another base than the one that everybody
    has, and the adapter would be of that one. Not taken off: the function starts nearer to the unquantised base's. A
    weight from which nothing was taken starts as any other.
    """
    error = W.to(layer.lora_A.device).float() - layer.dense().detach().float()
    if not error.any():
        kaiming(layer, generator)
        return
    U, S, Vt = torch.linalg.svd(error, full_matrices=False)
    r = _rank_within_width(layer, S.numel())
    root = (S[:r] / layer.scale).sqrt()
    layer.begin_at(root.unsqueeze(1) * Vt[:r], U[:, :r] * root)


def eva(layer: LoRALayer, generator: Generator, directions: Tensor) -> None:
    """A holds the directions [r, in] in which the layer's inputs vary most, B is zero (Paischer et al. 2024, section 3.2)."""
    layer.begin_at(directions, torch.zeros_like(layer.lora_B))


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


# From the layer alone
INITS: dict[str, Init] = {
    "default": kaiming,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "pissa": pissa,
    "olora": olora,
}
# From the layer and what is given for each module: its unquantised weight, the directions of its inputs
GIVEN_INITS: dict[str, Init] = {"loftq": loftq, "eva": eva}
