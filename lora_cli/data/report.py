"""What became of the rows: counted while they were tokenized, told as a report, or as an error where too many are lost."""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_cli.data.examples import Examples
from lora_cli.data.formats import PREFERENCE
from lora_cli.data.order import epoch_length
from lora_cli.data.tokenizing import NAMED_ROWS, Faults, How, Made
from lora_cli.errors import DataError, Problem

MAX_DROPPED = 0.05  # share of the rows that may be left out before it is an error
Notice = tuple[int, str]  # level, text


@dataclass(frozen=True)
class Spread:
    """Tokens an example has: half, 95 and 99 in 100 and all of them have at most so many."""

    p50: int
    p95: int
    p99: int
    longest: int


@dataclass(frozen=True)
class SourceReport:
    """What one source gives: rows read, examples made of them, and its share of an epoch's examples."""

    rows: int
    examples: int
    tokens: int
    trained_tokens: int
    share: float


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
    sources: dict[str, SourceReport]  # by name, in the order of the recipe
    labels: dict[str, int] = field(default_factory=dict)  # label -> examples, in the order of the head's outputs

    @property
    def format(self) -> str:
        """Of the first source, where there are several."""
        return next(iter(self.formats.values()))

    @property
    def used(self) -> int:
        return self.rows - sum(self.dropped.values())

    def summary(self) -> str:
        """One line: `1,451 rows (alpaca), 84,168 trained tokens of 144,734; 3 left out (empty answer)`."""
        learned = f"{self.trained_tokens:,} trained tokens of {self.tokens:,}"
        if self.labels:
            learned = f"{len(self.labels):,} labels, {self.tokens:,} tokens"
        parts = [f"{self.rows:,} rows ({', '.join(sorted(set(self.formats.values())))}), {learned}"]
        if PREFERENCE in self.formats.values():
            parts.append(f"{self.examples:,} examples, two for a pair")
        elif self.examples != self.used:
            parts.append(f"{self.examples:,} examples, for the chat template renders earlier turns anew")
        parts += [f"{count:,} left out ({reason})" for reason, count in self.dropped.items()]
        if self.cut_rows:
            parts.append(f"{self.cut_rows:,} cut to max_length by {self.cut_tokens:,} tokens")
        return "; ".join(parts)


def report_of(
    made: Made,
    by_source: Mapping[str, Made],
    formats: Mapping[str, str],
    examples: Examples,
    labels: Sequence[str],
    learned: str,
) -> DataReport:
    """`made` is of all sources together; `examples` are what they gave, and `learned` what a row is empty without."""
    length, counts = epoch_length(examples), Counter(examples.labels.tolist())
    return DataReport(
        formats=dict(formats),
        rows=made.rows,
        dropped={reason: count for reason, count in _dropped(made, learned).items() if count},
        examples=made.examples,
        cut_rows=made.cut_rows,
        cut_tokens=made.cut_tokens,
        tokens=made.tokens,
        trained_tokens=made.trained_tokens,
        lengths=spread(made.lengths),
        prompts=spread(made.prompts),
        fingerprint=examples.fingerprint,
        sources={
            name: SourceReport(
                rows=own.rows,
                examples=own.examples,
                tokens=own.tokens,
                trained_tokens=own.trained_tokens,
                share=epoch_length(examples.of_source(name)) / max(1, length),
            )
            for name, own in by_source.items()
        },
        labels={label: counts[number] for number, label in enumerate(labels)},
    )


def report_from_json(found: Mapping[str, Any]) -> DataReport:
    """What `dataclasses.asdict` made of a report."""
    spreads = {name: Spread(**found[name]) for name in ("lengths", "prompts")}
    sources = {name: SourceReport(**own) for name, own in found["sources"].items()}
    return DataReport(**{**found, **spreads, "sources": sources})


def spread(lengths: Counter[int]) -> Spread:
    """The smallest lengths that hold 50, 95, 99 and 100 % (zeros for no lengths at all)."""
    places = [math.ceil(share * lengths.total()) for share in (0.5, 0.95, 0.99, 1)]
    found, done = [], 0
    for length, count in sorted(lengths.items()):
        done += count
        found += [length] * sum(place <= done for place in places[len(found) :])
    return Spread(*(found or [0] * 4))


def refuse_bad(faults: Faults, rows: int, bad_rows: str) -> None:
    """DataError for rows that cannot be used, all at once; with `bad_rows: skip`, for more than MAX_DROPPED of them."""
    if not faults.count or (bad_rows == "skip" and faults.count <= MAX_DROPPED * rows):
        return
    if faults.count == 1 and bad_rows == "error":
        raise DataError(faults.named[0])
    too_many = f", and `data.bad_rows: skip` skips at most {MAX_DROPPED:.0%}" if bad_rows == "skip" else ""
    what = f"{faults.count:,} of {rows:,} rows cannot be used{too_many}" + _named(faults.named)
    raise DataError(Problem(what, fix=faults.fix))


def losses(made: Made, how: How) -> list[Notice]:
    """What is to be said of the rows that are left out; DataError for more than MAX_DROPPED of them."""
    bad, empty, rows = made.bad, made.empty, made.rows
    if bad.count + empty.count + made.without_answer > MAX_DROPPED * rows:
        raise DataError(*_lost(made, how))
    notices = []
    if bad.count:
        notices.append(f"{bad.count} of {rows} rows cannot be used and are left out{_named(bad.named)}")
    if empty.count:
        notices.append(
            f"{empty.count} of {rows} rows have an empty {how.learned} and are left out{_named(empty.named)}"
        )
    return [(logging.WARNING, notice) for notice in notices]


def _dropped(made: Made, learned: str) -> dict[str, int]:
    return {
        "unusable": made.bad.count,
        f"empty {learned}": made.empty.count,
        "no answer within max_length": made.without_answer,
    }


def _lost(made: Made, how: How) -> list[Problem]:
    rows, bad, empty, problems = made.rows, made.bad, made.empty, []
    if bad.count:
        what = f"{bad.count:,} of {rows:,} rows cannot be used" + _named(bad.named[: NAMED_ROWS // 2])
        problems.append(Problem(what, fix="put them right, or take the rows out"))
    if empty.count:
        what = f"{empty.count:,} of {rows:,} rows have an empty {how.learned}" + _named(empty.named[: NAMED_ROWS // 2])
        problems.append(Problem(what, fix=f"fill the {how.learned}s in, or take the rows out"))
    if made.without_answer:
        prompts = spread(made.prompts)
        problems.append(
            Problem(
                f"{made.without_answer:,} of {rows:,} rows lose their whole answer to `data.max_length: {how.max_length}`",
                line=f"prompts have {prompts.p50:,} tokens (p50), {prompts.p95:,} (p95), {prompts.longest:,} (longest)",
                fix=f"set `data.max_length: {spread(made.lengths).p95}`, which keeps 95 % of the rows whole, or shorten "
                "the prompts",
            )
        )
    return problems


def _named(problems: Sequence[Problem]) -> str:
    return ":" + "".join(f"\n  {problem.where}: {problem.what}" for problem in problems)
