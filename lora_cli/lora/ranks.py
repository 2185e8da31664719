"""Which rank each module of an adapter gets when it is cut: one number for all, a share of energy, or a budget."""

import heapq
from collections.abc import Mapping

from lora_cli.errors import Problem, RecipeError
from lora_cli.lora.config import of_expert
from lora_cli.lora.svd import SVD

BYTES_EACH = 4  # adapters are stored in float32


def by_number(spectra: Mapping[str, SVD], r: int) -> dict[str, int]:
    """r everywhere. Raises RecipeError where that is above every rank there is: it could add nothing."""
    largest = max(len(found.S) for found in spectra.values())
    if r > largest:
        raise RecipeError(
            Problem(
                f"`--r {r}` is above the adapter's largest rank, {largest}: more rank can't add anything to it",
                fix=f"give an r of at most {largest}; to train on with more, start a run",
            )
        )
    return dict.fromkeys(spectra, r)


def by_energy(spectra: Mapping[str, SVD], share: float) -> dict[str, int]:
    """The fewest terms of each module that hold `share` of its ‖ΔW‖²."""
    return {path: found.rank_of_energy(share) for path, found in spectra.items()}


def by_budget(spectra: Mapping[str, SVD], parameters: int) -> dict[str, int]:
    """One term a module, then whichever next term holds most of ‖ΔW‖² a parameter, until none fits any more.

    Raises RecipeError when one term a module is too much already.
    """
    groups: dict[str, list[str]] = {}  # experts of one parameter have one rank
    for path in spectra:
        groups.setdefault(of_expert(path)[0], []).append(path)
    cost = {name: sum(len(spectra[p].U) + len(spectra[p].V) for p in paths) for name, paths in groups.items()}
    most = {name: max(len(spectra[p].S) for p in paths) for name, paths in groups.items()}
    left = parameters - sum(cost.values())
    if left < 0:
        raise RecipeError(
            Problem(
                f"the budget allows {parameters:,} parameters, and rank 1 on these modules has {sum(cost.values()):,}",
                fix="allow more, or take an adapter of fewer modules",
            )
        )

    def gain(name: str, term: int) -> float:
        return sum(float(spectra[p].S[term]) ** 2 for p in groups[name] if term < len(spectra[p].S)) / cost[name]

    ranks = dict.fromkeys(groups, 1)
    queue = [(-gain(name, 1), name) for name in groups if most[name] > 1]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        if cost[name] > left:
            continue  # a cheaper module may still fit
        left -= cost[name]
        ranks[name] += 1
        if ranks[name] < most[name]:
            heapq.heappush(queue, (-gain(name, ranks[name]), name))
    return {path: ranks[name] for name, paths in groups.items() for path in paths}
