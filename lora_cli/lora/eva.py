"""EVA: A starts where the inputs of a module vary most, and modules whose inputs vary in more directions get more rank.

mini-batches of training rows -> the inputs of each module -> their principal directions, batch by batch
-> the share of the variance that each explains -> the N · r best of all modules -> rank and A of each module

Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation",
sections 3.2 and 3.3; the incremental decomposition is that of Ross et al. 2008, section 3.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import sqrt

import torch
from torch import Tensor, nn

CONVERGED = 0.99  # cosine of each direction with that of the batch before: the paper's τ


class Principal:
    """The first `most` principal directions of vectors that come in batches; memory holds most × width of them."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.count = 0
        self.mean = torch.zeros(())
        self.squares = torch.zeros(())  # Σ ‖x − mean‖²
        self.S = torch.zeros(0)
        self.directions = torch.zeros(0, 0)  # [k, width], orthonormal
        self.converged = False

    @torch.no_grad()
    def add(self, X: Tensor) -> None:
        """X: [vectors, width]"""
        X, before = X.float(), self.directions
        n, m = self.count, len(X)
        mean = X.mean(dim=0)
        moved = self.mean - mean if n else torch.zeros_like(mean)
        rows = [X - mean, sqrt(n * m / (n + m)) * moved.unsqueeze(0)]  # the second: the mean has moved (Ross, 3.1)
        self.squares = sum(row.square().sum() for row in rows) + (self.squares if n else 0)
        kept = [self.S.unsqueeze(1) * before] if n else []
        _, S, Vh = torch.linalg.svd(torch.cat(kept + rows), full_matrices=False)
        self.S, self.directions = S[: self.most], Vh[: self.most]
        self.mean = (n * self.mean + m * mean) / (n + m) if n else mean
        self.count = n + m
        if len(before) == len(self.directions):
            self.converged = bool(((before * self.directions).sum(dim=1).abs() >= CONVERGED).all())

    @property
    def explained(self) -> Tensor:
        """[k]: the share of the variance in each direction, in falling order."""
        return self.S.square() / self.squares.clamp_min(torch.finfo(torch.float32).tiny)


def principal_directions(
    model: nn.Module, paths: Sequence[str], batches: Iterable[Callable[[], None]], most: int
) -> dict[str, Principal]:
    """What the inputs of the modules at `paths` vary in, over the forwards that each of `batches` makes.

    Modules that read the same input (q, k and v) share what is found. It ends where all have converged.
    """
    inputs: dict[str, list[Tensor]] = {path: [] for path in paths}
    shared: dict[str, str] = {}  # path -> the first path with the same input
    seen: list[tuple[Tensor, str]] = []

    def note(path: str) -> Callable:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0]
            if path not in shared:
                shared[path] = next((first for other, first in seen if other is x), path)
                seen.append((x, path))
            if shared[path] == path and not found[path].converged:
                inputs[path].append(x.detach().reshape(-1, x.shape[-1]))

        return hook

    found = {path: Principal(most) for path in paths}
    hooks = [model.get_submodule(path).register_forward_pre_hook(note(path)) for path in paths]
    try:
        for forward in batches:
            forward()
            seen.clear()
            for path, collected in inputs.items():
                if collected:
                    found[path].add(torch.cat(collected))
                    collected.clear()
            if all(found[shared.get(path, path)].converged for path in paths):
                break
    finally:
        for hook in hooks:
            hook.remove()
    return {path: found[shared.get(path, path)] for path in paths}


def ranks_by_variance(found: Mapping[str, Principal], r: int, rho: float) -> dict[str, int]:
    """Rank by path: the N · r directions that explain most, of N modules; none gets more than ρ · r (section 3.3)."""
    most = max(1, round(rho * r))
    shares = [
        (-share, place, path)
        for path, principal in found.items()
        for place, share in enumerate(principal.explained[:most].tolist())
    ]
    best = sorted(shares, key=lambda entry: entry[:2])[: len(found) * r]
    ranks = dict.fromkeys(found, 0)
    for _, _, path in best:
        ranks[path] += 1
    return ranks
