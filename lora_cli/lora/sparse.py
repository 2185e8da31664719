"""Combining dense updates of one weight: TIES, DARE and magnitude pruning.

All three thin the updates out before they are added, so that they get less in each other's way. They act on single
entries of ΔW, which factors don't show: on A and B alone they would mean something else.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor


def ties(updates: Sequence[Tensor], weights: Sequence[float], density: float, _: Generator | None = None) -> Tensor:
    """Trim, elect a sign, and average what agrees with it (Yadav et al. 2023, TIES-Merging, section 4, algorithm 1).

    A weight counts before the election, so that a negative one votes for the other sign.
    """
    weighted = [weight * largest(update, density) for update, weight in zip(updates, weights, strict=True)]
    elected = sum(weighted).sign()
    total, count = torch.zeros_like(weighted[0]), torch.zeros_like(weighted[0])
    for update in weighted:
        agrees = (update.sign() == elected) & (update != 0)
        total += update * agrees
        count += agrees
    return total / count.clamp(min=1)


def dare(updates: Sequence[Tensor], weights: Sequence[float], density: float, generator: Generator) -> Tensor:
    """Drop entries at random, and scale up what stays, so that the mean stays (Yu et al. 2024, DARE, section 3)."""
    total = torch.zeros_like(updates[0])
    for update, weight in zip(updates, weights, strict=True):
        kept = torch.rand(update.shape, generator=generator) < density
        total += update * kept * (weight / density)
    return total


def magnitude(
    updates: Sequence[Tensor], weights: Sequence[float], density: float, _: Generator | None = None
) -> Tensor:
    """The largest entries of each, added."""
    return sum(weight * largest(update, density) for update, weight in zip(updates, weights, strict=True))


def largest(update: Tensor, density: float) -> Tensor:
    """The update with all but its `density` largest entries zero."""
    flat = update.flatten()
    kept = flat.abs().topk(max(1, int(density * flat.numel()))).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(update)
