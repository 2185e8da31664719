"""The order in which training takes examples, and which of them are held out.

The order is a pure function of (seed, epoch). Epochs stand one behind the other as one endless sequence, and step k
takes its positions k·B … (k + 1)·B - 1: so resuming is skipping, and any number of devices sees the same rows.

Where sources are mixed, each is an endless sequence of its own, and every epoch takes the next of it, as many as its
weight or share says: so after some epochs all its rows have come equally often, but for one.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256

import numpy as np
import torch

from lora_cli.data.examples import Array, Examples
from lora_cli.data.types import Example
from lora_cli.errors import DataError, Problem

EpochOf = Callable[[int], Array]  # epoch -> the places it takes, in order


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[Examples, Examples]:
    """(train, held out), both in file order: at least one row each, and never one row in both."""
    examples = Examples.of(examples)
    _, first, row_of = np.unique(examples.row_keys, return_index=True, return_inverse=True)
    if len(first) < 2:
        raise DataError(Problem(f"{len(first)} usable row cannot be split", fix="set `data.eval: null`, or add rows"))
    count = min(max(1, round(share * len(first))), len(first) - 1)
    held_out = np.zeros(len(first), bool)
    held_out[np.argsort(first)[_permutation(f"eval of {seed}", len(first))[:count]]] = True
    return examples.take(np.flatnonzero(~held_out[row_of])), examples.take(np.flatnonzero(held_out[row_of]))


def order(seed: int, epoch: int, count: int) -> list[int]:
    """The places of `count` examples in the order of one epoch, where each comes once."""
    return _shuffled(seed, epoch, count).tolist()


def epoch_length(examples: Sequence[Example]) -> int:
    """How many positions of the endless sequence an epoch has: as many as examples, but where sources are mixed."""
    return sum(group.takes for group in _groups(examples))


@dataclass(frozen=True)
class Plan:
    """How many positions of the endless sequence a run takes, and how many of them a step."""

    positions: int
    global_batch_size: int

    @property
    def steps(self) -> int:
        """The last one may be shorter."""
        return math.ceil(self.positions / self.global_batch_size)


def plan(count: int, *, epochs: float, max_steps: int | None, global_batch_size: int) -> Plan:
    """`max_steps` if it is set, else `epochs` of `count` examples each (`epoch_length`)."""
    positions = max_steps * global_batch_size if max_steps else max(1, round(epochs * count))
    return Plan(positions, global_batch_size)


def steps(examples: Sequence[Example], plan: Plan, *, seed: int, start: int = 0) -> Iterator[tuple[int, list[Example]]]:
    """(k, the rows of step k over all devices) for k = start … plan.steps - 1; `start` is the number of steps done."""
    for k, taken in enumerate(places(examples, plan, seed=seed, start=start), start):
        yield k, [examples[place] for place in taken.tolist()]


def places(examples: Sequence[Example], plan: Plan, *, seed: int, start: int = 0) -> Iterator[Array]:
    """Where the rows of each step stand among the examples."""
    size, length = plan.global_batch_size, epoch_length(examples)
    epoch_of = _epochs(examples, seed)
    for k in range(start, plan.steps):
        yield _stretch(epoch_of, length, k * size, min(size, plan.positions - k * size))


@dataclass(frozen=True, eq=False)
class _Group:
    """The places of the examples that are taken alike, and how many of them an epoch takes."""

    source: str
    repeats: float
    places: Array

    @property
    def takes(self) -> int:
        return max(1, round(self.repeats * len(self.places)))


def _groups(examples: Sequence[Example]) -> list[_Group]:
    """In the order of their first examples."""
    examples = Examples.of(examples)
    kinds: dict[tuple[str, float], int] = {}
    numbers = [kinds.setdefault((origin.source, origin.repeats), len(kinds)) for origin in examples.origins]
    kind_of = np.array(numbers or [0])[examples.column("origin")]
    groups = [_Group(*kind, np.flatnonzero(kind_of == number)) for kind, number in kinds.items()]
    return sorted((group for group in groups if len(group.places)), key=lambda group: group.places[0])


def _epochs(examples: Sequence[Example], seed: int) -> EpochOf:
    groups = _groups(examples)
    if all(group.repeats == 1 for group in groups):
        return lru_cache(maxsize=2)(lambda epoch: _shuffled(seed, epoch, len(examples)))
    orders = [_order_of(group, seed) for group in groups]

    @lru_cache(maxsize=2)
    def places(epoch: int) -> Array:
        taken = np.concatenate(
            [
                group.places[_stretch(own, len(group.places), epoch * group.takes, group.takes)]
                for group, own in zip(groups, orders, strict=True)
            ]
        )
        return taken[_shuffled(seed, epoch, len(taken))]

    return places


def _order_of(group: _Group, seed: int) -> EpochOf:
    """The order in which the endless sequence of one source takes its own examples."""
    return lru_cache(maxsize=2)(
        lambda epoch: _permutation(f"epoch {epoch} of {group.source} of {seed}", len(group.places))
    )


def _stretch(epoch_of: EpochOf, length: int, start: int, count: int) -> Array:
    """`count` places from position `start` of the endless sequence epoch 0, epoch 1, …, of `length` places each."""
    pieces = []
    while count > 0:
        epoch, offset = divmod(start, length)
        pieces.append(epoch_of(epoch)[offset : offset + count])
        start, count = start + len(pieces[-1]), count - len(pieces[-1])
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)


def _shuffled(seed: int, epoch: int, count: int) -> Array:
    return _permutation(f"epoch {epoch} of {seed}", count)


def _permutation(name: str, count: int) -> Array:
    seed = int.from_bytes(sha256(name.encode()).digest()[:7], "little")
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
