"""What an update's singular values and directions tell: how much of its rank works, and what it shares with another's.

    φ(A, B, i, j) = ‖V_Aᵢᵀ V_Bⱼ‖² / min(i, j)      1: one space holds the other, 0: they have nothing in common

(Hu et al. 2021, section 7.2, equation 4). V are the right singular vectors of ΔW = B A, where the paper takes those of A:
the space is the same, and ΔW's order of directions doesn't depend on how B and A share the strength.
"""

from typing import Literal

import torch
from torch import Tensor

from lora_cli.lora.inject import generator_for
from lora_cli.lora.svd import SVD, of_dense

Side = Literal["input", "output"]
INTRUDER_TOP = 10  # how many directions of W + ΔW are looked at
INTRUDER_COSINE = 0.5  # below this to every direction of W, one is an intruder


def effective_rank(S: Tensor) -> float:
    """exp of the entropy of S / ΣS: k for k equal singular values (Roy & Vetterli 2007)."""
    p = S[S > 0] / S.sum()
    return float((-(p * p.log()).sum()).exp()) if len(p) else 0.0


def overlap(first: SVD, second: SVD, side: Side = "input") -> Tensor:
    """[r_A, r_B]: φ for the first i and the first j directions of the input that two updates read, or of the output
    that they write."""
    squares = (_directions(first, side).T @ _directions(second, side)).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, n + 1, dtype=squares.dtype) for n in squares.shape)
    return squares / torch.minimum(i.unsqueeze(1), j.unsqueeze(0))


def inner_product(first: SVD, second: SVD) -> float:
    """⟨ΔW_A, ΔW_B⟩, without forming either."""
    left, right = first.U.T @ second.U, first.V.T @ second.V
    return float((first.S.unsqueeze(1) * left * right * second.S).sum())


def intruders(W: Tensor, update: Tensor) -> int:
    """How many of the leading directions of W + ΔW are like none of W's (Shuttleworth et al. 2024, algorithm 1).

    Left singular vectors, all of W's: an exact decomposition, which takes minutes on weights of several thousands.
    """
    W = W.float()
    U, S, _ = torch.linalg.svd(W, full_matrices=False)
    known = U[:, S.gt(1e-5 * S[0])]  # what W does not use is no direction of its own
    top = of_dense(W + update, INTRUDER_TOP, generator_for(0, "intruders")).U[:, :INTRUDER_TOP].float()
    return int(((known.T @ top).abs().amax(0) < INTRUDER_COSINE).sum())


def _directions(found: SVD, side: Side) -> Tensor:
    """The singular vectors that the update has: those of singular values that are not rounding."""
    return (found.V if side == "input" else found.U)[:, : int(found.S.gt(1e-7 * found.S[:1]).sum())]
