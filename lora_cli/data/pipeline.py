"""rows -> format -> render -> Examples and a report; then the order in which training takes them.

The order is a pure function of (seed, epoch). Epochs stand one behind the other as one endless sequence, and step k
takes its positions k·B … (k + 1)·B - 1: so resuming is skipping, and any number of devices sees the same rows.

Where sources are mixed, each is an endless sequence of its own, and every epoch takes the next of it, as many as its
weight or share says: so after some epochs all its rows have come equally often, but for one.
"""

import difflib
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from lora_cli.data.formats import FORMATS, LABELLED, Format, detect, known_columns, templated
from lora_cli.data.render import Renderer, truncate
from lora_cli.data.sources import Columns, label, quote, rows
from lora_cli.data.types import BadRow, Example, Item, Labelled, NothingToLearn, RowId
from lora_cli.errors import DataError, Problem, RecipeError
from lora_cli.recipe.schema import Source, sources_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

MAX_DROPPED = 0.05  # share of the rows that may be left out before it is an error
NAMED_ROWS = 10  # rows that a message names
PEEKED_ROWS = 10  # rows that `format: auto` looks at
WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")


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
        if self.examples != self.used:
            parts.append(f"{self.examples:,} examples, for the chat template renders earlier turns anew")
        parts += [f"{count:,} left out ({reason})" for reason, count in self.dropped.items()]
        if self.cut_rows:
            parts.append(f"{self.cut_rows:,} cut to max_length by {self.cut_tokens:,} tokens")
        return "; ".join(parts)


@dataclass
class _Parsed:
    """The rows of all sources so far: read, unusable and empty ones. `counts` has the rows by source."""

    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    formats: dict[str, str] = field(default_factory=dict)
    items: list[tuple[RowId, Item]] = field(default_factory=list)
    bad: list[Problem] = field(default_factory=list)
    empty: list[Problem] = field(default_factory=list)
    learned: str = "answer"  # what a row is empty without


def load_examples(
    sources: str | Sequence[str | Source],
    *,
    folder: Path,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    train_on: str = "answers",
    bad_rows: str = "error",
    labels: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> tuple[list[Example], DataReport]:
    """All examples of the sources, one source after the other, each with at least one trained token.

    The options are the keys of the recipe's `data`; `progress` gets (rows rendered, rows in all). `labels` are what rows
    are classified as, where they are: none at all stand for those that the rows have. Raises DataError for rows that
    cannot be used, all of them at once (with `bad_rows: skip`, for more than MAX_DROPPED of them), and if more than
    MAX_DROPPED of the rows have nothing to learn.
    """
    entries, parsed = sources_of(sources), _Parsed(learned="answer" if labels is None else "text")
    if labels is not None and format == "auto":
        format = LABELLED
    for source in entries:
        _parse(_with_defaults(source, format, columns, template), folder, template, parsed)
    _refuse(parsed, bad_rows)  # before the time for rendering is spent
    classes = [] if labels is None else list(labels) or labels_in([item for _, item in parsed.items])
    renderer = Renderer(tokenizer, train_on, labels=classes, max_length=max_length)
    rendered = _render(parsed, renderer, progress or (lambda done, total: None))
    _refuse(parsed, bad_rows)
    examples, report = _fit(parsed, rendered, max_length, entries)
    counts = Counter(example.label for example in examples)
    return examples, replace(report, labels={label: counts[number] for number, label in enumerate(classes)})


def labels_in(items: Sequence[Item]) -> list[str]:
    """The labels of the rows, sorted: as numbers where all are."""
    found = {item.label for item in items if isinstance(item, Labelled)}
    return sorted(found, key=int if all(WHOLE_NUMBER.fullmatch(label) for label in found) else None)


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
    """The places of `count` examples in the order of one epoch, where each comes once."""
    return _permutation(f"epoch {epoch} of {seed}", count)


def epoch_length(examples: Sequence[Example]) -> int:
    """How many positions of the endless sequence an epoch has: as many as examples, but where sources are mixed."""
    return sum(_takes(group, examples) for group in _groups(examples).values())


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
    size = plan.global_batch_size
    endless = _endless(_epochs(examples, seed), epoch_length(examples), start * size)
    places = islice(endless, max(0, plan.positions - start * size))
    for k in range(start, plan.steps):
        yield k, [examples[place] for place in islice(places, size)]


def fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 of what is trained: every token with its weight, in order, and how sources are mixed; whatever file it
    came from."""
    digest = sha256()
    for example in examples:
        digest.update(len(example.input_ids).to_bytes(8, "little"))
        digest.update(np.asarray(example.input_ids, "<i8").tobytes() + np.asarray(example.weights, "<f8").tobytes())
        if example.repeats != 1:
            digest.update(np.float64(example.repeats).tobytes())
        if example.label is not None:
            digest.update(repr((example.label, example.segments)).encode())
    return digest.hexdigest()


def _with_defaults(source: Source, format: str, columns: Mapping[str, str] | None, template: str | None) -> Source:
    """The source with what `data` says for all of them where it says nothing itself."""
    format = "template" if template is not None else format
    own = {"format": source.format or format, "columns": columns if source.columns is None else source.columns}
    return source.model_copy(update=own)


def _parse(source: Source, folder: Path, template: str | None, parsed: _Parsed) -> None:
    """Adds the rows of one source; `auto` becomes the format that most of its first rows fit."""
    found = list(rows(source, folder=folder))
    name = label(source)
    readable = [(row, columns) for row, columns in found if not isinstance(columns, Problem)]
    parsed.rows += len(found)
    parsed.counts[name] += len(found)
    parsed.bad += [columns for _, columns in found if isinstance(columns, Problem)]
    if not found:
        raise DataError(Problem(f"`{name}` has no rows"))
    if not readable:
        return
    if source.columns:
        readable = _renamed(readable, source.columns, name, template)
    format = templated(template) if source.format == "template" else None
    if format:
        _check_fields(format, [columns for _, columns in readable], name)
    parsed.formats[name] = _format_name(source, name, [columns for _, columns in readable[:PEEKED_ROWS]])
    if parsed.formats[name] == LABELLED:
        _check_columns(FORMATS[LABELLED], [columns for _, columns in readable], name)
    parse = (format or FORMATS[parsed.formats[name]]).parse
    for row, columns in readable:
        try:
            parsed.items.append((row, parse(columns)))
        except NothingToLearn as error:
            parsed.empty.append(_problem(row, error))
        except BadRow as error:
            parsed.bad.append(_problem(row, error))


def _renamed(
    found: Sequence[tuple[RowId, Columns]], mapping: Mapping[str, str], source: str, template: str | None
) -> list[tuple[RowId, Columns]]:
    """The rows with our names for the columns of `mapping` (ours -> the file's)."""
    known = [name[0] for name in templated(template).needs] if template else []
    known += known_columns()
    if unknown := [name for name in mapping if name not in known]:
        what = f"`data.columns` names `{quote(unknown[0])}`, a column that no format reads"
        raise RecipeError(Problem(what, fix=_meant(unknown[0], known, "the columns of the formats are")))
    there = _columns_of([columns for _, columns in found])
    lost = [
        Problem(
            f"`data.columns` takes `{ours}` from `{quote(theirs)}`, a column that the rows do not have",
            where=source,
            fix=_meant(theirs, there, "their columns are"),
        )
        for ours, theirs in mapping.items()
        if theirs not in there
    ]
    if lost:
        raise DataError(*lost)
    theirs = set(mapping.values())
    return [
        (
            row,
            {name: value for name, value in columns.items() if name not in theirs}
            | {ours: columns[name] for ours, name in mapping.items() if name in columns},
        )
        for row, columns in found
    ]


def _check_fields(format: Format, found: Sequence[Columns], source: str) -> None:
    """Every field of a template is a column of some row; a row that lacks one is a bad row."""
    there = _columns_of(found)
    lost = [
        Problem(
            f"`data.template` names `{name}`, a column that the rows do not have",
            where=source,
            fix=_meant(name, there, "their columns are"),
        )
        for (name,) in format.needs
        if name not in there
    ]
    if lost:
        raise DataError(*lost)


def _check_columns(format: Format, found: Sequence[Columns], source: str) -> None:
    """Every column that the format needs is a column of some row; a row that lacks one is a bad row."""
    there = _columns_of(found)
    lost = [name for (name,) in format.needs if name not in there]
    if lost:
        named = ", ".join(f"`{quote(column)}`" for column in there)
        what = f"`training.objective: classify` reads {' and '.join(f'`{name}`' for name in lost)}, which no row has"
        fix = f"name the column with `data.columns: {{{lost[0]}: …}}`; the rows have {named}"
        raise DataError(Problem(what, where=source, fix=fix))


def _columns_of(found: Sequence[Columns]) -> list[str]:
    return list(dict.fromkeys(name for columns in found for name in columns))


def _meant(name: str, names: Sequence[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"write `{quote(near[0])}`" if near else f"{otherwise} {', '.join(f'`{quote(known)}`' for known in names)}"


def _format_name(source: Source, name: str, first: Sequence[Columns]) -> str:
    """The format by name; under `auto`, that of the columns that were given our names, if they make one."""
    if source.format != "auto":
        return source.format
    return detect(source.columns or {}) or _detected(name, first)


def _detected(source: str, first: Sequence[Columns]) -> str:
    names = Counter(name for columns in first if (name := detect(columns)))
    shown = ", ".join(f"`{quote(column)}`" for column in first[0])
    if not names:
        known = ", ".join(f"{name} ({format})" for name, format in FORMATS.items() if name != LABELLED)
        fix = f"set `data.columns` or `data.template`; the formats are {known}"
        raise DataError(Problem(f"the columns {shown} fit no format", where=source, fix=fix))
    name, _ = names.most_common(1)[0]
    log.info("%s: format `%s` found from the columns %s", source, name, shown)
    if name == "text" and FORMATS[LABELLED].fits(first[0]):
        log.info("%s: the column `label` is not read; `training.objective: classify` would learn it", source)
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


def _refuse(parsed: _Parsed, bad_rows: str) -> None:
    bad = parsed.bad
    if not bad or (bad_rows == "skip" and len(bad) <= MAX_DROPPED * parsed.rows):
        return
    if len(bad) == 1 and bad_rows == "error":
        raise DataError(bad[0])
    too_many = f", and `data.bad_rows: skip` skips at most {MAX_DROPPED:.0%}" if bad_rows == "skip" else ""
    what = f"{len(bad):,} of {parsed.rows:,} rows cannot be used{too_many}" + _named(bad)
    raise DataError(Problem(what, fix=next((problem.fix for problem in bad if problem.fix), "")))


def _named(problems: Sequence[Problem]) -> str:
    return ":" + "".join(f"\n  {problem.where}: {problem.what}" for problem in problems[:NAMED_ROWS])


def _fit(
    parsed: _Parsed, rendered: Sequence[Sequence[Example]], max_length: int, entries: Sequence[Source]
) -> tuple[list[Example], DataReport]:
    """Cuts every example to max_length, leaves out the rows that have nothing to learn then, and counts it all."""
    full = [example for row in rendered for example in row]
    kept = [[short for example in row if (short := truncate(example, max_length)).items] for row in rendered]
    examples = _mixed([example for row in kept for example in row], entries)
    used = [
        (sum(e.full_length for e in old), sum(len(e.input_ids) for e in new))
        for old, new in zip(rendered, kept, strict=True)
        if new
    ]
    dropped = {
        "unusable": len(parsed.bad),
        f"empty {parsed.learned}": len(parsed.empty),
        "no answer within max_length": len(rendered) - len(used),
    }
    lengths, prompts = _spread([e.full_length for e in full]), _spread([e.prompt_length for e in full])
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
        sources=_by_source(examples, entries, parsed),
    )


def _spread(lengths: Sequence[int]) -> Spread:
    """The smallest lengths that hold 50, 95, 99 and 100 % (zeros for no lengths at all)."""
    ranked = sorted(lengths) or [0]
    return Spread(*(ranked[math.ceil(share * len(ranked)) - 1] for share in (0.5, 0.95, 0.99, 1)))


def _refuse_losses(parsed: _Parsed, cut_away: int, max_length: int, lengths: Spread, prompts: Spread) -> None:
    bad, empty = len(parsed.bad), len(parsed.empty)
    if bad + empty + cut_away <= MAX_DROPPED * parsed.rows:
        if bad:
            log.warning("%d of %d rows cannot be used and are left out%s", bad, parsed.rows, _named(parsed.bad))
        if empty:
            log.warning(
                "%d of %d rows have an empty %s and are left out%s",
                empty,
                parsed.rows,
                parsed.learned,
                _named(parsed.empty),
            )
        return
    problems = []
    if bad:
        what = f"{bad:,} of {parsed.rows:,} rows cannot be used" + _named(parsed.bad[: NAMED_ROWS // 2])
        problems.append(Problem(what, fix="put them right, or take the rows out"))
    if empty:
        what = f"{empty:,} of {parsed.rows:,} rows have an empty {parsed.learned}"
        what += _named(parsed.empty[: NAMED_ROWS // 2])
        problems.append(Problem(what, fix=f"fill the {parsed.learned}s in, or take the rows out"))
    if cut_away:
        problems.append(
            Problem(
                f"{cut_away:,} of {parsed.rows:,} rows lose their whole answer to `data.max_length: {max_length}`",
                line=f"prompts have {prompts.p50:,} tokens (p50), {prompts.p95:,} (p95), {prompts.longest:,} (longest)",
                fix=f"set `data.max_length: {lengths.p95}`, which keeps 95 % of the rows whole, or shorten the prompts",
            )
        )
    raise DataError(*problems)


def _mixed(examples: list[Example], entries: Sequence[Source]) -> list[Example]:
    """The examples with how often an epoch takes them; the same objects where nothing is to be mixed."""
    if all(source.weight is None and source.share is None for source in entries):
        return examples
    counts = Counter(example.row.source for example in examples)
    total = sum(source.share or 0 for source in entries)
    repeats = {
        label(source): (source.weight or 1.0)
        if source.share is None
        else source.share / total * len(examples) / max(1, counts[label(source)])
        for source in entries
    }
    return [replace(example, repeats=repeats[example.row.source]) for example in examples]


def _by_source(examples: Sequence[Example], entries: Sequence[Source], parsed: _Parsed) -> dict[str, SourceReport]:
    found: dict[str, list[Example]] = {label(source): [] for source in entries}
    for example in examples:
        found[example.row.source].append(example)
    length = epoch_length(examples)
    return {
        name: SourceReport(
            rows=parsed.counts[name],
            examples=len(own),
            tokens=sum(len(e.input_ids) for e in own),
            trained_tokens=sum(weight > 0 for e in own for weight in e.weights),
            share=epoch_length(own) / max(1, length),
        )
        for name, own in found.items()
    }


def _permutation(name: str, count: int) -> list[int]:
    seed = int.from_bytes(sha256(name.encode()).digest()[:7], "little")
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def _epochs(examples: Sequence[Example], seed: int) -> Callable[[int], list[int]]:
    """Epoch -> the places it takes, in order."""
    if all(example.repeats == 1 for example in examples):
        return lambda epoch: order(seed, epoch, len(examples))
    groups = [
        (_endless_of(source, seed, len(group)), group, _takes(group, examples))
        for (source, _), group in _groups(examples).items()
    ]

    def places(epoch: int) -> list[int]:
        taken = [group[i] for own, group, takes in groups for i in islice(own(epoch * takes), takes)]
        return [taken[i] for i in order(seed, epoch, len(taken))]

    return places


def _endless_of(source: str, seed: int, count: int) -> Callable[[int], Iterator[int]]:
    """Position -> what comes from there on in the endless sequence of one source's examples."""
    return partial(_endless, lambda epoch: _permutation(f"epoch {epoch} of {source} of {seed}", count), count)


def _groups(examples: Sequence[Example]) -> dict[tuple[str, float], list[int]]:
    """The places of the examples that are taken alike."""
    found: dict[tuple[str, float], list[int]] = {}
    for place, example in enumerate(examples):
        found.setdefault((example.row.source, example.repeats), []).append(place)
    return found


def _takes(group: Sequence[int], examples: Sequence[Example]) -> int:
    """How many of a group an epoch takes."""
    return max(1, round(examples[group[0]].repeats * len(group)))


def _endless(epoch_of: Callable[[int], list[int]], length: int, start: int) -> Iterator[int]:
    """Places from position `start` of the endless sequence epoch 0, epoch 1, …, of `length` places each."""
    epoch, offset = divmod(start, length)
    while True:
        yield from epoch_of(epoch)[offset:]
        epoch, offset = epoch + 1, 0
