"""How the rows of a step lie on the processes: dealt, packed or batched by length, and collated.

Which rows a step has is decided before (`data.pipeline.steps`), and losses are sums, so nothing here changes what is
trained: not the number of processes, not the micro-batch, not packing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora_cli.data.collate import blank, collate
from lora_cli.data.packing import deal, first_fit_decreasing
from lora_cli.data.types import Batch, Example

Rows = list[Example]


@dataclass(frozen=True)
class Layout:
    """`micro_batch_size` rows a forward; with `row_length`, examples are packed into rows of so many tokens."""

    micro_batch_size: int
    row_length: int | None = None


def halved(layout: Layout, rows: Rows) -> Layout | None:
    """Half the tokens a forward: half the rows, else packed rows half as long; None where a forward is one example.

    Packed rows get no shorter than the longest of `rows`; a longer example, later, has a row of its own.
    """
    if layout.micro_batch_size > 1:
        return replace(layout, micro_batch_size=layout.micro_batch_size // 2)
    longest = max(len(row.input_ids) for row in rows)
    if layout.row_length is None or layout.row_length <= longest:
        return None
    return replace(layout, row_length=max(longest, layout.row_length // 2))


def micro_batches(
    rows: Rows, layout: Layout, *, rank: int, processes: int, sources: Sequence[str] = ()
) -> list[tuple[int, Batch]]:
    """This rank's share of a step as (place of its first example in the step, batch).

    With `sources`, batches tell which tokens are from which of them. Every rank gets the same number of batches, as
    sharded models need: a rank that runs out repeats an example with no weight.
    """
    chunks = _chunks(rows, layout, rank, processes)
    return [(chunk[0][0], collate([line for _, line in chunk], sources)) for chunk in chunks]


def examples_of(rows: Rows, layout: Layout, *, rank: int, processes: int) -> list[Rows]:
    """The examples of each micro-batch of a rank, for messages that name them."""
    chunks = _chunks(rows, layout, rank, processes)
    return [[example for _, line in chunk for example in line] for chunk in chunks]


def forward_rows(rows: Rows, layout: Layout) -> list[Rows]:
    """The rows of a step's forwards on one process: the examples of each, one where nothing is packed."""
    lengths = [len(row.input_ids) for row in rows]
    [share] = _shares(lengths, 1, layout)
    return [[rows[place] for place in line] for line in _lines(lengths, share, layout)]


def filled(rows: Rows, layout: Layout) -> float:
    """The share of the forwards' tokens that is no padding."""
    batches = micro_batches(rows, layout, rank=0, processes=1)
    return sum(len(row.input_ids) for row in rows) / sum(batch["input_ids"].numel() for _, batch in batches)


def _chunks(rows: Rows, layout: Layout, rank: int, processes: int) -> list[list[tuple[int, Rows]]]:
    """The forwards of a rank, each as rows of (place of the first example in the step, examples)."""
    lengths = [len(row.input_ids) for row in rows]
    shares = [_lines(lengths, share, layout) for share in _shares(lengths, processes, layout)]
    most = max(map(len, shares))
    lines = [(line[0], [rows[place] for place in line]) for line in shares[rank]]
    shortest = lengths.index(min(lengths))
    lines += [(shortest, [blank(rows[shortest])])] * (most - len(lines))
    size = layout.micro_batch_size
    return [lines[i : i + size] for i in range(0, len(lines), size)]


def _shares(lengths: list[int], processes: int, layout: Layout) -> list[list[int]]:
    """Places of the examples by rank: of equal number by length, or, where rows are packed, of equal tokens."""
    if layout.row_length:
        return deal(lengths, processes)
    by_length = sorted(range(len(lengths)), key=lambda place: (lengths[place], place))
    return [by_length[rank::processes] for rank in range(processes)]


def _lines(lengths: list[int], share: list[int], layout: Layout) -> list[list[int]]:
    """Places by row, rows of like length together."""
    if not layout.row_length:
        return [[place] for place in share]
    packed = first_fit_decreasing([lengths[place] for place in share], layout.row_length)
    lines = [[share[i] for i in row] for row in packed]
    return sorted(lines, key=lambda line: (sum(lengths[place] for place in line), line))
