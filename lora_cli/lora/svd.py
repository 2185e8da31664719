"""The singular value decomposition of an update: exact from its factors, without ever forming out × in.

    scale · B A = Q_B (scale · R_B R_Aᵀ) Q_Aᵀ        B = Q_B R_B,  Aᵀ = Q_A R_A;  the middle is r × r

Its first r terms are the best update of rank r there is (Eckart & Young 1936), and what is cut off is known exactly.
A dense update is decomposed directly where it is small, else by random projection (Halko, Martinsson & Tropp 2011).
"""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Generator, Tensor

from lora_cli.lora.adapter import Factors

EXACT_WIDTH = 768  # the narrower side up to which a dense matrix is decomposed exactly
OVERSAMPLED = 16
POWER_STEPS = 6


@dataclass(frozen=True)
class SVD:
    """U [out, k], S [k] in falling order, V [in, k], float64; `norm` is ‖ΔW‖, also of what lies beyond the k terms."""

    U: Tensor
    S: Tensor
    V: Tensor
    norm: float

    def factors(self, r: int) -> Factors:
        """A and B of the first r terms, each with half of the strength, for a scale of 1; zeros beyond the k terms."""
        root = self.S[:r].sqrt()
        A = torch.zeros(r, len(self.V), dtype=torch.float32)
        B = torch.zeros(len(self.U), r, dtype=torch.float32)
        A[: len(root)] = (self.V[:, :r] * root).T
        B[:, : len(root)] = self.U[:, :r] * root
        return Factors(A, B)

    def error(self, r: int) -> float:
        """‖ΔW − its first r terms‖ / ‖ΔW‖."""
        cut = float(self.S[r:].square().sum())
        beyond = max(0.0, self.norm**2 - float(self.S.square().sum())) if self.is_partial else 0.0
        return sqrt(cut + beyond) / self.norm if self.norm else 0.0

    def rank_of_energy(self, share: float) -> int:
        """The fewest terms that hold `share` of ‖ΔW‖², at least 1; all k where they don't reach it."""
        held = self.S.square().cumsum(0)
        return min(len(self.S), 1 + int((held < share * self.norm**2 * (1 - 1e-12)).sum()))

    @property
    def is_partial(self) -> bool:
        return len(self.S) < min(len(self.U), len(self.V)) and self.norm**2 > float(self.S.square().sum()) * (1 + 1e-9)


def of_factors(factors: Factors, scale: float) -> SVD:
    """Of scale · B A, to rounding: at most r terms."""
    Q_B, R_B = torch.linalg.qr(factors.B.double())
    Q_A, R_A = torch.linalg.qr(factors.A.double().T)
    U, S, Vh = torch.linalg.svd(scale * R_B @ R_A.T)
    k = min(len(U), len(Vh))
    return SVD(Q_B @ U[:, :k], S, Q_A @ Vh[:k].T, float(S.norm()))


def of_dense(M: Tensor, r: int, generator: Generator) -> SVD:
    """Of M [out, in]: all terms where M is small or r is not, else the first r."""
    width = min(M.shape)
    norm = float(torch.linalg.vector_norm(M, dtype=torch.float64))
    if width <= EXACT_WIDTH or 4 * (r + OVERSAMPLED) > width:
        U, S, Vh = torch.linalg.svd(M.double(), full_matrices=False)
        return SVD(U, S, Vh.T, norm)
    Q = _range(M, r + OVERSAMPLED, generator)
    U, S, Vh = torch.linalg.svd((Q.T @ M).double(), full_matrices=False)
    return SVD(Q.double() @ U[:, :r], S[:r], Vh[:r].T, norm)


def of_dense_by_energy(M: Tensor, share: float, generator: Generator) -> SVD:
    """Of M [out, in], with as many terms as hold `share` of ‖M‖²: twice as many each time, until they do."""
    r = 32
    while True:
        found = of_dense(M, r, generator)
        if len(found.S) == min(M.shape) or float(found.S.square().sum()) >= share * found.norm**2:
            return found
        r *= 2


def distance(M: Tensor, factors: Factors) -> float:
    """‖M − B A‖, row block by row block."""
    blocks = zip(M.split(1024), factors.B.split(1024), strict=True)
    return sqrt(sum(float(torch.linalg.vector_norm(m - B @ factors.A, dtype=torch.float64)) ** 2 for m, B in blocks))


def _range(M: Tensor, width: int, generator: Generator) -> Tensor:
    """[out, width]: orthonormal, spanning where M's largest directions go; the powers sharpen a flat spectrum."""
    Q = torch.linalg.qr(M @ torch.randn(M.shape[1], width, generator=generator)).Q
    for _ in range(POWER_STEPS):
        Q = torch.linalg.qr(M @ torch.linalg.qr(M.T @ Q).Q).Q
    return Q
