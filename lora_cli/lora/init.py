"""How A and B start: one function each, (layer, generator) -> None.

A start is a property of a run, not of the adapter: what is saved is always a plain adapter of the unchanged base.
"""

from collections.abc import Callable
from math import sqrt

import torch
from torch import Generator, nn

from lora_cli.lora.layer import LoRALinear
from lora_cli.lora.weights import dense

Init = Callable[[LoRALinear, Generator], None]


def kaiming(layer: LoRALinear, generator: Generator) -> None:
    """A uniform as in nn.Linear, B zero: what loralib and PEFT do."""
    A = torch.empty(layer.lora_A.shape)
    nn.init.kaiming_uniform_(A, a=sqrt(5), generator=generator)
    layer.begin_at(A, torch.zeros_like(layer.lora_B))


def gaussian(layer: LoRALinear, generator: Generator) -> None:
    """A normal with deviation 1/r, B zero (Hu et al. 2021, section 4.1, with PEFT's deviation)."""
    A = torch.empty(layer.lora_A.shape).normal_(std=1 / len(layer.lora_A), generator=generator)
    layer.begin_at(A, torch.zeros_like(layer.lora_B))


def pissa(layer: LoRALinear, generator: Generator) -> None:
    """The principal singular directions of W: scale · B A is its best rank-r part (Meng et al. 2024, section 3)."""
    U, S, Vt = torch.linalg.svd(dense(layer.base).detach().float(), full_matrices=False)
    r = _rank_within_width(layer, S.numel())
    root = (S[:r] / layer.scale).sqrt()
    layer.begin_at(root.unsqueeze(1) * Vt[:r], U[:, :r] * root)


def olora(layer: LoRALinear, generator: Generator) -> None:
    """The leading part of W's QR decomposition: B orthonormal, A upper triangular (Büyükakyüz 2024, section 3)."""
    Q, R = torch.linalg.qr(dense(layer.base).detach().float())
    r = _rank_within_width(layer, len(R))
    layer.begin_at(R[:r], Q[:, :r])


def _rank_within_width(layer: LoRALinear, width: int) -> int:
    r = len(layer.lora_A)
    if r > width:
        raise ValueError(f"a rank of {r} has no {r} directions of a weight of width {width} to start from")
    return r


INITS: dict[str, Init] = {"default": kaiming, "gaussian": gaussian, "pissa": pissa, "olora": olora}
