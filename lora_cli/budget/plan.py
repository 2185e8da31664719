"""The choice of micro-batch and checkpointing: of all that fit the memory there is, the one that takes the least time.

What a recipe fixes is respected. Where nothing fits, the choice is what needs the least.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from lora_cli.budget.speed import Rates, seconds
from lora_cli.budget.step import Batch, Setup, StepMemory, step_memory
from lora_cli.models.recompute import EVERY_BLOCK, MLP, NOTHING, Recompute

MODES: tuple[Recompute, ...] = (NOTHING, 4, 3, 2, MLP, EVERY_BLOCK)
# What the allocator can't hand out again, as a share of what comes and goes in a step. An assumption, with room to spare
FRAGMENTED = 0.08


@dataclass(frozen=True)
class Lengths:
    """The rows of a run, in tokens; `share` of them is trained."""

    longest: int
    mean: float
    share: float = 1.0


@dataclass(frozen=True)
class Limits:
    """What there is to choose from: examples a step on one device, tokens of a forward at most, and what is fixed."""

    examples: int
    tokens: int
    pack_to: int | None = None
    micro_batch: int | None = None
    row_length: int | None = None
    recompute: Recompute | None = None


@dataclass(frozen=True)
class Option:
    """One way to run a step: `micro_batch` rows a forward, of `row_length` tokens where rows are packed."""

    micro_batch: int
    row_length: int | None
    recompute: Recompute
    batch: Batch
    memory: StepMemory
    seconds: float  # of one forward and backward
    factor: float = 1.0  # what comes and goes in a step, measured ÷ predicted

    @property
    def needed(self) -> int:
        """With what the allocator loses."""
        return self.memory.standing + round(self.factor * self._passing) + self.lost

    @property
    def lost(self) -> int:
        return round(FRAGMENTED * self.factor * self._passing)

    @property
    def _passing(self) -> int:
        return self.memory.total - self.memory.standing

    @property
    def tokens_per_second(self) -> float:
        return self.batch.tokens / self.seconds


def choose(setup: Setup, lengths: Lengths, limits: Limits, rates: Rates, *, room: float, factor: float = 1.0) -> Option:
    """The fastest that needs at most `room` bytes, weights and all; the smallest where none does.

    A measured step may have shown that `factor` times as much comes and goes as the formula says. Packed rows are made
    shorter than they may be only where that saves computing things twice.
    """
    found: list[Option] = []
    cheapest = _modes(setup, limits)[0]
    for row_length in _row_lengths(lengths, limits):
        options = [replace(option, factor=factor) for option in _options(setup, lengths, limits, rates, row_length)]
        found += options
        if any(option.needed <= room for option in options if option.recompute == cheapest):
            break
    fitting = [option for option in found if option.needed <= room]
    return min(fitting, key=_slowness) if fitting else min(found, key=lambda option: option.needed)


def _slowness(option: Option) -> tuple[float, int, int]:
    """Seconds a token, to three digits; of equals the one of more tokens a forward, and of those the larger micro-batch."""
    return float(f"{1 / option.tokens_per_second:.3g}"), -option.batch.tokens, -option.micro_batch


def _options(setup: Setup, lengths: Lengths, limits: Limits, rates: Rates, row_length: int | None) -> Iterator[Option]:
    length = max(row_length or 0, lengths.longest)  # of the largest forward
    in_a_step = ceil(limits.examples * lengths.mean / length) if row_length else limits.examples
    for micro_batch in _micro_batches(limits, length, limits.tokens if row_length else limits.examples):
        rows = min(micro_batch, in_a_step)
        batch = Batch(rows, length, _logits(setup, rows, length, lengths.share))
        for recompute in _modes(setup, limits):
            memory = step_memory(setup, batch, recompute)
            took = seconds(setup, batch, recompute, rates)
            yield Option(micro_batch, row_length, recompute, batch, memory, took)


def _logits(setup: Setup, rows: int, length: int, share: float) -> int:
    """How many are made: of what is learned, or of every row at each place where one of them has something to learn."""
    if setup.in_stretches and setup.how.by_position:
        return ceil(rows * length * share)
    return ceil(rows * length * (1 - (1 - share) ** rows))


def _row_lengths(lengths: Lengths, limits: Limits) -> Iterator[int | None]:
    """Tokens of a packed row, the most first; None where nothing is packed.

    A longer example has a row of its own: to pack the short ones into rows as long would cost them attention over all of
    it, and save nothing.
    """
    if limits.pack_to is None:
        yield None
        return
    row_length = limits.row_length or min(limits.pack_to, limits.tokens)
    yield row_length
    if limits.row_length:
        return
    while row_length > lengths.longest:
        row_length = max(lengths.longest, row_length // 2)
        yield row_length


def _micro_batches(limits: Limits, row_length: int, most_rows: int) -> Iterator[int]:
    """Powers of two up to what a forward may have; or the one that the recipe fixes."""
    if limits.micro_batch:
        yield limits.micro_batch
        return
    most = min(most_rows, limits.tokens // row_length)
    yield from (1 << power for power in range(max(1, most.bit_length())))


def _modes(setup: Setup, limits: Limits) -> list[Recompute]:
    if limits.recompute is not None:
        return [limits.recompute]
    has_mlp = any(".mlp." in linear.path for linear in setup.shape.linears) or "num_local_experts" in setup.shape.config
    return [mode for mode in MODES if has_mlp or mode != MLP]
