"""Rows of sources -> Examples and a report.

The rows are read as a stream, tokenized chunk by chunk (`tokenizing`, `workers`) into flat arrays on disk (`examples`),
and kept there for the next time (`cache`): so neither rows nor examples have to fit into memory, and what was tokenized
once is mapped at once. What cannot be used is told when all rows have been seen, all of it together.
"""

import difflib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lora_cli.data.cache import REPORT, kept, key_of, tokenizer_key
from lora_cli.data.examples import Examples, Origin, Store, Writer, mapped, with_labels
from lora_cli.data.formats import FORMATS, LABELLED, detect, known_columns, sorted_labels, templated
from lora_cli.data.report import DataReport, Notice, losses, refuse_bad, report_from_json, report_of
from lora_cli.data.sources import Columns, Gauge, Raw, columns_of, content, label, quote, raw_rows, stamp
from lora_cli.data.tokenizing import Chunk, Faults, How, Made, Reading, format_of, renamed
from lora_cli.data.types import RowId
from lora_cli.data.workers import tokenized
from lora_cli.errors import DataError, Problem, RecipeError
from lora_cli.recipe.schema import Source, sources_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

PEEKED_ROWS = 10  # rows that `format: auto` looks at
CHUNK_ROWS, CHUNK_SIZE = 500, 200_000  # rows, and characters of them, that are tokenized together


class Tokenized(NamedTuple):
    """How far the rows are: the source that is read, the share of all sources that is done, rows and tokens so far."""

    source: str
    share: float
    rows: int
    tokens: int


OnTokenized = Callable[[Tokenized], None]


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
    progress: OnTokenized | None = None,
) -> tuple[Examples, DataReport]:
    """All examples of the sources, one source after the other, each with at least one trained token.

    The options are the keys of the recipe's `data`; `labels` are what rows are classified as, where they are: none at all
    stand for those that the rows have. `progress` is called while rows are tokenized, which rows that the cache holds
    are not. Raises DataError for rows that cannot be used, all of them at once (with `bad_rows: skip`, for
    more than MAX_DROPPED of them), and if more than MAX_DROPPED of the rows have nothing to learn.
    """
    if labels is not None and format == "auto":
        format = LABELLED
    entries = [_with_defaults(source, format, columns, template) for source in sources_of(sources)]
    how = How(max_length, template, train_on, bad_rows, None if labels is None else tuple(labels))
    for source in entries:
        _check_names(source, template)
    loading = _Loading(entries, folder, tokenizer, how, progress)
    key = key_of(
        {
            "sources": [source.model_dump() for source in entries],
            "content": _contents(entries, folder),
            "how": asdict(how),
            "tokenizer": tokenizer_key(tokenizer),
        }
    )
    examples, report, notices = kept(key, loading.make, _opened)
    for level, text in notices[len(loading.notices) :]:  # those that were not told while they were found
        log.log(level, "%s", text)
    return examples, report


def _with_defaults(source: Source, format: str, columns: Mapping[str, str] | None, template: str | None) -> Source:
    """The source with what `data` says for all of them where it says nothing itself."""
    format = "template" if template is not None else format
    own = {"format": source.format or format, "columns": columns if source.columns is None else source.columns}
    return source.model_copy(update=own)


def _contents(entries: Sequence[Source], folder: Path) -> list[str]:
    """A digest of each source; none is read twice."""
    found: dict[str, str] = {}
    for source in entries:
        if label(source) not in found:
            found[label(source)] = content(source, folder)
    return [found[label(source)] for source in entries]


def _opened(folder: Path) -> tuple[Examples, DataReport, list[Notice]]:
    found = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    origins = tuple(Origin(*origin) for origin in found["origins"])
    store = Store(mapped(folder, found["manifest"]), origins, tuple(found["labels"]))
    return Examples([store]), report_from_json(found["report"]), [tuple(notice) for notice in found["notices"]]


class _Loading:
    """The rows of all sources on their way into a folder, and what becomes of them, by source."""

    def __init__(
        self,
        entries: Sequence[Source],
        folder: Path,
        tokenizer: "PreTrainedTokenizerBase",
        how: How,
        progress: OnTokenized | None,
    ) -> None:
        self.entries, self.folder, self.tokenizer, self.how = entries, folder, tokenizer, how
        self.progress = progress or (lambda done: None)
        self.stamps = [stamp(source, folder) for source in entries]  # before their bytes are read for the key
        self.made = [Made() for _ in entries]
        self.formats: dict[str, str] = {}
        self.by_line = [True] * len(entries)
        self.labels: dict[str, int] = {label: number for number, label in enumerate(how.labels or ())}  # as they came
        self.undetected: dict[int, DataError] = {}  # by source; what its columns lack is told before
        self.notices: list[Notice] = []
        self._gauge, self._read = Gauge(), 0  # of the source that is read, and its characters so far

    def make(self, folder: Path) -> None:
        """Fills the folder of an entry of the cache."""
        with Writer(folder) as writer:
            current = 0
            for chunk, made, arrays in tokenized(self._chunks(), self.tokenizer, self.how, self._left):
                if chunk.reading.origin != current:
                    self._check_columns(current)
                current = chunk.reading.origin
                self.made[current].add(made)
                self._refuse_fault()
                codes = [self.labels.setdefault(label, len(self.labels)) for label in made.labels]
                writer.append(with_labels(arrays, codes))
                self.progress(self._tokenized(chunk))
            self._check_columns(current)
        total = self._refuse_losses()
        self._refuse_changes()
        origins, classes = tuple(self._origins(total)), list(self.how.labels or ()) or sorted_labels(self.labels)
        number_of = {label: number for number, label in enumerate(classes)}
        numbers = tuple(number_of[label] for label in self.labels)
        examples = Examples([Store(mapped(folder, writer.manifest), origins, numbers)])
        report = report_of(total, self._by_label(), self.formats, examples, classes, self.how.learned)
        document = {
            "manifest": writer.manifest,
            "origins": origins,
            "labels": numbers,
            "report": asdict(report),
            "notices": self.notices,
        }
        (folder / REPORT).write_text(json.dumps(document), encoding="utf-8")

    def _tokenized(self, chunk: Chunk) -> Tokenized:
        number = chunk.reading.origin
        sizes = [stamp[0] if stamp else 0 for stamp in self.stamps]
        sizes = sizes if all(sizes) else [1] * len(sizes)
        share = (sum(sizes[:number]) + chunk.share * sizes[number]) / sum(sizes)
        rows, tokens = (sum(getattr(own, name) for own in self.made) for name in ("rows", "tokens"))
        return Tokenized(label(self.entries[number]), share, rows, tokens)

    def _chunks(self) -> Iterator[Chunk]:
        for number, source in enumerate(self.entries):
            self._gauge, self._read = Gauge(), 0
            stream = raw_rows(source, folder=self.folder, gauge=self._gauge)
            first = self._peek(stream, self.made[number])
            if not self.made[number].rows and not first:
                raise DataError(Problem(f"`{label(source)}` has no rows"))
            if first:
                reading = self._reading(number, source, first)
                yield from self._cut([(row, raw) for row, raw, _ in first], stream, reading)

    def _peek(self, stream: Iterator[tuple[RowId, Raw]], made: Made) -> list[tuple[RowId, Raw, Columns]]:
        """The first rows that can be read; those before them that cannot are counted."""
        found: list[tuple[RowId, Raw, Columns]] = []
        for row, raw in stream:
            columns = columns_of(row, raw)
            if isinstance(columns, Problem):
                made.rows += 1
                made.unreadable.add(columns)
                continue
            found.append((row, raw, columns))
            if len(found) == PEEKED_ROWS:
                break
        return found

    def _reading(self, number: int, source: Source, first: Sequence[tuple[RowId, Raw, Columns]]) -> Reading:
        mapping = source.columns or {}
        self.by_line[number] = first[0][0].is_line
        try:
            format = self._format(source, [renamed(columns, mapping) for _, _, columns in first])
        except DataError as error:
            if not mapping:
                raise
            self.undetected[number], format = error, None
        else:
            self.formats[label(source)] = format
        return Reading(number, format, mapping)

    def _cut(
        self, first: list[tuple[RowId, Raw]], stream: Iterator[tuple[RowId, Raw]], reading: Reading
    ) -> Iterator[Chunk]:
        """The rows in chunks of about the same size."""
        rows, size = first, sum(_size(raw) for _, raw in first)
        for row, raw in stream:
            if len(rows) >= CHUNK_ROWS or size >= CHUNK_SIZE:
                self._read += size
                yield Chunk(reading, rows, self._gauge.share, render=not self._certain())
                rows, size = [], 0
            rows.append((row, raw))
            size += _size(raw)
        yield Chunk(reading, rows, 1.0, render=not self._certain())

    def _left(self) -> float:
        """About how many characters of rows are still to come."""
        share = max(self._gauge.share, 1e-9)
        behind = sum(stamp[0] for stamp in self.stamps[len(self.formats) :] if stamp)
        return self._read * (1 - share) / share + behind

    def _certain(self) -> bool:
        """Whether nothing more needs to be rendered, because what was read is an error already."""
        return self.how.bad_rows == "error" and any(own.unusable.count for own in self.made)

    def _format(self, source: Source, first: Sequence[Columns]) -> str:
        """The format by name; under `auto`, that of the columns that were given our names, if they make one, else the
        one that most of the first rows fit."""
        if source.format != "auto":
            return source.format
        if named := detect(source.columns or {}):
            return named
        names = Counter(name for columns in first if (name := detect(columns)))
        shown = ", ".join(f"`{quote(column)}`" for column in first[0])
        if not names:
            known = ", ".join(f"{name} ({format})" for name, format in FORMATS.items() if name != LABELLED)
            fix = f"set `data.columns` or `data.template`; the formats are {known}"
            raise DataError(Problem(f"the columns {shown} fit no format", where=label(source), fix=fix))
        name, _ = names.most_common(1)[0]
        self._notice((logging.INFO, f"{label(source)}: format `{name}` found from the columns {shown}"))
        if name == "text" and FORMATS[LABELLED].fits(first[0]):
            unread = "the column `label` is not read; `training.objective: classify` would learn it"
            self._notice((logging.INFO, f"{label(source)}: {unread}"))
        return name

    def _check_columns(self, number: int) -> None:
        """DataError for columns that a source must have and that none of its rows has."""
        source, there = self.entries[number], self.made[number].columns
        if not there:
            return
        mapping = source.columns or {}
        where = label(source)
        missing = {
            f"`data.columns` takes `{ours}` from `{quote(theirs)}`": theirs
            for ours, theirs in mapping.items()
            if theirs not in there
        }
        if not missing and source.format == "template":
            there = renamed(there, mapping)
            needed = [name for (name,) in format_of("template", self.how.template).needs]
            missing = {f"`data.template` names `{name}`": name for name in needed if name not in there}
        if missing:
            raise DataError(
                *(
                    Problem(
                        f"{what}, a column that the rows do not have",
                        where=where,
                        fix=_meant(name, list(there), "their columns are"),
                    )
                    for what, name in missing.items()
                )
            )
        if number in self.undetected:
            raise self.undetected[number]
        if self.formats[where] == LABELLED:
            _check_labelled(where, list(renamed(there, mapping)))

    def _refuse_fault(self) -> None:
        """Raises what no row can mend; rows that cannot be used come before it."""
        if fault := next((own.fault for own in self.made if own.fault), None):
            kind, problems = fault
            total = _together(self.made)
            refuse_bad(total.unusable, total.rows, self.how.bad_rows)
            raise kind(*problems)

    def _refuse_losses(self) -> Made:
        """What all sources gave; DataError for too many rows that cannot be used or have nothing to learn."""
        total = _together(self.made)
        refuse_bad(total.unusable, total.rows, self.how.bad_rows)
        refuse_bad(total.bad, total.rows, self.how.bad_rows)
        for notice in losses(total, self.how):
            self._notice(notice)
        return total

    def _refuse_changes(self) -> None:
        for source, before in zip(self.entries, self.stamps, strict=True):
            if stamp(source, self.folder) != before:
                raise DataError(Problem(f"`{label(source)}` was changed while it was read", fix="run it again"))

    def _by_label(self) -> dict[str, Made]:
        names = dict.fromkeys(map(label, self.entries))
        return {
            name: _together([own for own, entry in zip(self.made, self.entries, strict=True) if label(entry) == name])
            for name in names
        }

    def _origins(self, total: Made) -> Iterator[Origin]:
        """What the examples of each source have in common, with how often an epoch takes them."""
        shares = sum(source.share or 0 for source in self.entries)
        for source, own, is_line in zip(self.entries, self.made, self.by_line, strict=True):
            repeats = source.weight or 1.0
            if source.share is not None:
                repeats = source.share / shares * total.examples / max(1, own.examples)
            yield Origin(label(source), is_line, repeats)

    def _notice(self, notice: Notice) -> None:
        self.notices.append(notice)
        log.log(notice[0], "%s", notice[1])


def _together(parts: Sequence[Made]) -> Made:
    """The sum, in which the rows of one source that cannot be read and those that do not fit stand together."""
    total = Made()
    for own in parts:
        total.add(replace(own, unreadable=own.unusable, unfit=Faults()))
    return total


def _check_names(source: Source, template: str | None) -> None:
    """RecipeError for a name in `columns` that no format reads."""
    known = [name[0] for name in templated(template).needs] if template else []
    known += known_columns()
    if unknown := [name for name in source.columns or {} if name not in known]:
        what = f"`data.columns` names `{quote(unknown[0])}`, a column that no format reads"
        raise RecipeError(Problem(what, fix=_meant(unknown[0], known, "the columns of the formats are")))


def _check_labelled(where: str, there: Sequence[str]) -> None:
    """Every column that a row to be classified needs is a column of some row; a row that lacks one is a bad row."""
    if lost := [name for (name,) in FORMATS[LABELLED].needs if name not in there]:
        named = ", ".join(f"`{quote(column)}`" for column in there)
        what = f"`training.objective: classify` reads {' and '.join(f'`{name}`' for name in lost)}, which no row has"
        fix = f"name the column with `data.columns: {{{lost[0]}: …}}`; the rows have {named}"
        raise DataError(Problem(what, where=where, fix=fix))


def _meant(name: str, names: Sequence[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"write `{quote(near[0])}`" if near else f"{otherwise} {', '.join(f'`{quote(known)}`' for known in names)}"


def _size(raw: Raw) -> int:
    return len(raw) if isinstance(raw, str) else len(str(raw))
