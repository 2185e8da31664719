"""rows -> format -> render -> Examples and a report; then the order in which training takes them.

The order is a pure function of (seed, epoch). Epochs stand one behind the other as one endless sequence, and step k
takes its positions k·B … (k + 1)·B - 1: so resuming is skipping, and any number of devices sees the same rows.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from lora_cli.data.formats import FORMATS, detect
from lora_cli.data.render import Renderer, truncate
from lora_cli.data.sources import Columns, quote, rows
from lora_cli.data.types import BadRow, Example, Item, NothingToLearn, RowId
from lora_cli.errors import DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

MAX_DROPPED = 0.05  # share of the rows that may be left out before it is an error
NAMED_ROWS = 10  # rows that a message names
PEEKED_ROWS = 10  # rows that `format: auto` looks at


@dataclass(frozen=True)
class Spread:
    """Tokens an example has: half, 95 in 100 and all of them have at most so many."""

    p50: int
    p95: int
    longest: int


@dataclass(frozen=True)
class DataReport:
    """What became of the rows, counted while they were rendered."""

    formats: dict[str, str]  # source -> format
    rows: int
    dropped: dict[str, int]  # reason -> rows that are left out
    examples: int  # more than the rows used where a chat template renders earlier turns anew
    cut_rows: int
    cut_tokens: int
    tokens: int
    trained_tokens: int
    lengths: Spread  # before max_length
    prompts: Spread
    fingerprint: str  # of all tokens and weights, in order

    @property
    def format(self) -> str:
        """Of the first source, where there are several."""
        return next(iter(self.formats.values()))

    @property
    def used(self) -> int:
        return self.rows - sum(self.dropped.values())

    def summary(self) -> str:
        """One line: `1,451 rows (alpaca), 84,168 trained tokens of 144,734; 3 left out (empty answer)`."""
        parts = [
            f"{self.rows:,} rows ({', '.join(sorted(set(self.formats.values())))}), "
            f"{self.trained_tokens:,} trained tokens of {self.tokens:,}"
        ]
        if self.examples != self.used:
            parts.append(f"{self.examples:,} examples, for the chat template renders earlier turns anew")
        parts += [f"{count:,} left out ({reason})" for reason, count in self.dropped.items()]
        if self.cut_rows:
            parts.append(f"{self.cut_rows:,} cut to max_length by {self.cut_tokens:,} tokens")
        return "; ".join(parts)


@dataclass
class _Parsed:
    """The rows of all sources so far: read, unusable and empty ones."""

    rows: int = 0
    formats: dict[str, str] = field(default_factory=dict)
    items: list[tuple[RowId, Item]] = field(default_factory=list)
    bad: list[Problem] = field(default_factory=list)
    empty: list[Problem] = field(default_factory=list)


def load_examples(
    sources: str | Sequence[str],
    *,
    folder: Path,
    format: str,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    progress: Progress | None = None,
) -> tuple[list[Example], DataReport]:
    """All examples of the sources, one source after the other, each with at least one trained token.

    `format` is a name of FORMATS or `auto`. `progress` gets (rows rendered, rows in all). Raises DataError for rows
    that cannot be used, all of them at once, and if more than MAX_DROPPED of the rows have nothing to learn.
    """
    parsed = _Parsed()
    for source in [sources] if isinstance(sources, str) else sources:
        _parse(source, folder, format, parsed)
    _refuse(parsed.bad, parsed.rows)  # before the time for rendering is spent
    rendered = _render(parsed, Renderer(tokenizer), progress or (lambda done, total: None))
    _refuse(parsed.bad, parsed.rows)
    return _fit(parsed, rendered, max_length)


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, held out), both in file order: at least one row each, and never one row in both."""
    ids = list(dict.fromkeys(example.row for example in examples))
    if len(ids) < 2:
        raise DataError(Problem(f"{len(ids)} usable row cannot be split", fix="set `data.eval: null`, or add rows"))
    count = min(max(1, round(share * len(ids))), len(ids) - 1)
    held_out = {ids[place] for place in _permutation(f"eval of {seed}", len(ids))[:count]}
    train = [example for example in examples if example.row not in held_out]
    return train, [example for example in examples if example.row in held_out]


def order(seed: int, epoch: int, count: int) -> list[int]:
    """The places of `count` examples in the order of one epoch."""
    return _permutation(f"epoch {epoch} of {seed}", count)


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
    """`max_steps` if it is set, else `epochs` over `count` examples."""
    positions = max_steps * global_batch_size if max_steps else max(1, round(epochs * count))
    return Plan(positions, global_batch_size)


def steps(examples: Sequence[Example], plan: Plan, *, seed: int, start: int = 0) -> Iterator[tuple[int, list[Example]]]:
    """(k, the rows of step k over all devices) for k = start … plan.steps - 1; `start` is the number of steps done."""
    size = plan.global_batch_size
    places = islice(_endless(seed, len(examples), start * size), max(0, plan.positions - start * size))
    for k in range(start, plan.steps):
        yield k, [examples[place] for place in islice(places, size)]


def fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 of what is trained: every token with its weight, in order, whatever file it came from."""
    digest = sha256()
    for example in examples:
        digest.update(len(example.input_ids).to_bytes(8, "little"))
        digest.update(np.asarray(example.input_ids, "<i8").tobytes() + np.asarray(example.weights, "<f8").tobytes())
    return digest.hexdigest()


def _parse(source: str, folder: Path, format: str, parsed: _Parsed) -> None:
    """Adds the rows of one source; `auto` becomes the format that most of its first rows fit."""
    found = list(rows(source, folder=folder))
    readable = [(row, columns) for row, columns in found if not isinstance(columns, Problem)]
    parsed.rows += len(found)
    parsed.bad += [columns for _, columns in found if isinstance(columns, Problem)]
    if not found:
        raise DataError(Problem(f"`{source}` has no rows"))
    if not readable:
        return
    name = _detected(source, [columns for _, columns in readable[:PEEKED_ROWS]]) if format == "auto" else format
    parsed.formats[source] = name
    for row, columns in readable:
        try:
            parsed.items.append((row, FORMATS[name].parse(columns)))
        except NothingToLearn as error:
            parsed.empty.append(_problem(row, error))
        except BadRow as error:
            parsed.bad.append(_problem(row, error))


def _detected(source: str, first: Sequence[Columns]) -> str:
    names = Counter(name for columns in first if (name := detect(columns)))
    shown = ", ".join(f"`{quote(column)}`" for column in first[0])
    if not names:
        known = ", ".join(f"{name} ({format})" for name, format in FORMATS.items())
        raise DataError(Problem(f"the columns {shown} fit no format", where=source, fix=f"the formats are {known}"))
    name, _ = names.most_common(1)[0]
    log.info("%s: format `%s` found from the columns %s", source, name, shown)
    return name


def _problem(row: RowId, error: BadRow) -> Problem:
    return Problem(error.what, where=str(row), fix=error.fix)


def _render(parsed: _Parsed, renderer: Renderer, progress: Progress) -> list[list[Example]]:
    """The examples of each row, in full length; rows that the template refuses go to the bad ones."""
    rendered = []
    for done, (row, item) in enumerate(parsed.items, 1):
        try:
            rendered.append(renderer.render(item, row))
        except BadRow as error:
            parsed.bad.append(_problem(row, error))
        progress(done, len(parsed.items))
    return rendered


def _refuse(bad: Sequence[Problem], count: int) -> None:
    if len(bad) == 1:
        raise DataError(bad[0])
    if bad:
        what = f"{len(bad):,} of {count:,} rows cannot be used" + _named(bad)
        raise DataError(Problem(what, fix=next((problem.fix for problem in bad if problem.fix), "")))


def _named(problems: Sequence[Problem]) -> str:
    return ":" + "".join(f"\n  {problem.where}: {problem.what}" for problem in problems[:NAMED_ROWS])


def _fit(parsed: _Parsed, rendered: Sequence[Sequence[Example]], max_length: int) -> tuple[list[Example], DataReport]:
    """Cuts every example to max_length, leaves out the rows that have nothing to learn then, and counts it all."""
    full = [example for row in rendered for example in row]
    kept = [[short for example in row if (short := truncate(example, max_length)).items] for row in rendered]
    examples = [example for row in kept for example in row]
    used = [
        (sum(len(e.input_ids) for e in old), sum(len(e.input_ids) for e in new))
        for old, new in zip(rendered, kept, strict=True)
        if new
    ]
    dropped = {"empty answer": len(parsed.empty), "no answer within max_length": len(rendered) - len(used)}
    lengths, prompts = _spread([len(e.input_ids) for e in full]), _spread([e.prompt_length for e in full])
    _refuse_losses(parsed, dropped["no answer within max_length"], max_length, lengths, prompts)
    return examples, DataReport(
        formats=parsed.formats,
        rows=parsed.rows,
        dropped={reason: count for reason, count in dropped.items() if count},
        examples=len(examples),
        cut_rows=sum(new < old for old, new in used),
        cut_tokens=sum(old - new for old, new in used),
        tokens=sum(len(e.input_ids) for e in examples),
        trained_tokens=sum(weight > 0 for e in examples for weight in e.weights),
        lengths=lengths,
        prompts=prompts,
        fingerprint=fingerprint(examples),
    )


def _spread(lengths: Sequence[int]) -> Spread:
    """The smallest lengths that hold 50, 95 and 100 % (zeros for no lengths at all)."""
    ranked = sorted(lengths) or [0]
    p50, p95, longest = (ranked[math.ceil(share * len(ranked)) - 1] for share in (0.5, 0.95, 1))
    return Spread(p50, p95, longest)


def _refuse_losses(parsed: _Parsed, cut_away: int, max_length: int, lengths: Spread, prompts: Spread) -> None:
    empty = len(parsed.empty)
    if empty and empty + cut_away <= MAX_DROPPED * parsed.rows:
        log.warning("%d of %d rows have an empty answer and are left out%s", empty, parsed.rows, _named(parsed.empty))
    if empty + cut_away <= MAX_DROPPED * parsed.rows:
        return
    problems = []
    if empty:
        what = f"{empty:,} of {parsed.rows:,} rows have an empty answer" + _named(parsed.empty[: NAMED_ROWS // 2])
        problems.append(Problem(what, fix="fill the answers in, or take the rows out"))
    if cut_away:
        problems.append(
            Problem(
                f"{cut_away:,} of {parsed.rows:,} rows lose their whole answer to `data.max_length: {max_length}`",
                line=f"prompts have {prompts.p50:,} tokens (p50), {prompts.p95:,} (p95), {prompts.longest:,} (longest)",
                fix=f"set `data.max_length: {lengths.p95}`, which keeps 95 % of the rows whole, or shorten the prompts",
            )
        )
    raise DataError(*problems)


def _permutation(name: str, count: int) -> list[int]:
    seed = int.from_bytes(sha256(name.encode()).digest()[:7], "little")
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def _endless(seed: int, count: int, start: int) -> Iterator[int]:
    """Places from position `start` of the endless sequence epoch 0, epoch 1, …"""
    epoch, offset = divmod(start, count)
    while True:
        yield from order(seed, epoch, count)[offset:]
        epoch, offset = epoch + 1, 0
