"""Rows -> flat examples and counts, a chunk at a time: the work of one process, which knows nothing of the others.

What a chunk gives is added up in the order of the chunks (`Made.add`), so it does not matter who made it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_cli.data.examples import Arrays, flat
from lora_cli.data.formats import FORMATS, Format, templated
from lora_cli.data.render import Renderer, truncate
from lora_cli.data.sources import Columns, Raw, columns_of
from lora_cli.data.types import BadRow, Example, Item, NothingToLearn, RowId
from lora_cli.errors import Problem, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMED_ROWS = 10  # rows that a message names


@dataclass(frozen=True)
class How:
    """The keys of `data` that hold for all sources."""

    max_length: int
    template: str | None = None
    train_on: str = "answers"
    bad_rows: str = "error"
    labels: tuple[str, ...] | None = None  # what rows are classified as; none stand for those that the rows have

    @property
    def learned(self) -> str:
        """What a row is empty without."""
        return "answer" if self.labels is None else "text"


@dataclass(frozen=True)
class Reading:
    """How the rows of one source are read; without a format, only for the names of their columns."""

    origin: int
    format: str | None
    columns: Mapping[str, str]  # ours -> the file's


@dataclass(frozen=True)
class Chunk:
    """Neighbouring rows of one source; `render` is False once an error is certain, and all bad rows are to be found."""

    reading: Reading
    rows: list[tuple[RowId, Raw]]
    share: float  # of the source that has been read with it
    render: bool = True


@dataclass
class Faults:
    """Rows that cannot be used: how many, the first of them, and the first fix."""

    count: int = 0
    named: list[Problem] = field(default_factory=list)
    fix: str = ""

    def add(self, problem: Problem) -> None:
        self.extend(Faults(1, [problem], problem.fix))

    def extend(self, others: "Faults") -> None:
        self.count += others.count
        self.named += others.named[: NAMED_ROWS - len(self.named)]
        self.fix = self.fix or others.fix


@dataclass
class Made:
    """What has become of some rows. Lengths are those before max_length."""

    rows: int = 0
    unreadable: Faults = field(default_factory=Faults)
    unfit: Faults = field(default_factory=Faults)  # for their format
    refused: Faults = field(default_factory=Faults)  # by the chat template
    empty: Faults = field(default_factory=Faults)
    fault: tuple[type[UserError], tuple[Problem, ...]] | None = None  # of the tokenizer, which no row can mend
    columns: dict[str, None] = field(default_factory=dict)  # names that the rows have
    labels: tuple[str, ...] = ()  # by the number that the examples of a chunk have for them
    lengths: Counter[int] = field(default_factory=Counter)
    prompts: Counter[int] = field(default_factory=Counter)
    without_answer: int = 0  # rows whose whole answer lies beyond max_length
    cut_rows: int = 0
    cut_tokens: int = 0
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0

    def add(self, others: "Made") -> None:
        for name, value in vars(others).items():
            mine = getattr(self, name)
            match mine:
                case Faults():
                    mine.extend(value)
                case Counter() | dict():
                    mine.update(value)
                case int():
                    setattr(self, name, mine + value)
        self.fault = self.fault or others.fault

    @property
    def unusable(self) -> Faults:
        """Rows that are known to be unusable before any is rendered."""
        return _joined(self.unreadable, self.unfit)

    @property
    def bad(self) -> Faults:
        """Rows that cannot be used, those of the template last."""
        return _joined(self.unreadable, self.unfit, self.refused)


class Tokenizing:
    """Chunks -> examples, by one tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", how: How) -> None:
        self.renderer = Renderer(tokenizer, how.train_on, labels=how.labels or (), max_length=how.max_length)
        self.how = how

    def __call__(self, chunk: Chunk) -> tuple[Made, Arrays]:
        made = Made(rows=len(chunk.rows))
        items = list(self._items(chunk, made))
        certain = self.how.bad_rows == "error" and made.unusable.count
        examples = [] if certain or not chunk.render else list(self._examples(items, made))
        made.labels = tuple(self.renderer.labels)
        made.examples = len(examples)
        made.tokens = sum(len(example.input_ids) for example in examples)
        arrays = flat(examples, [chunk.reading.origin] * len(examples))
        made.trained_tokens = int(arrays.records["trained"].sum())
        return made, arrays

    def _items(self, chunk: Chunk, made: Made) -> Iterator[tuple[RowId, Item]]:
        parse = self._parser(chunk.reading.format)
        for row, raw in chunk.rows:
            columns = columns_of(row, raw)
            if isinstance(columns, Problem):
                made.unreadable.add(columns)
                continue
            made.columns |= dict.fromkeys(columns)
            if parse is None:
                continue
            try:
                yield row, parse(renamed(columns, chunk.reading.columns))
            except NothingToLearn as error:
                made.empty.add(_problem(row, error))
            except BadRow as error:
                made.unfit.add(_problem(row, error))

    def _parser(self, format: str | None) -> Callable[[Columns], Item] | None:
        return None if format is None else format_of(format, self.how.template).parse

    def _examples(self, items: list[tuple[RowId, Item]], made: Made) -> Iterator[Example]:
        """The examples of each row, cut to max_length; rows that have nothing to learn then give none."""
        self.renderer.foresee(item for _, item in items)
        if self.how.labels == ():
            self.renderer.meet(item for _, item in items)
        for row, item in items:
            try:
                full = self.renderer.render(item, row)
            except BadRow as error:
                made.refused.add(_problem(row, error))
                continue
            except UserError as error:
                made.fault = type(error), error.problems
                return
            kept = [short for example in full if (short := truncate(example, self.how.max_length)).items]
            if full[0].side and len(kept) < len(full):
                kept = []  # of a pair neither is of use alone
            made.lengths.update(example.full_length for example in full)
            made.prompts.update(example.prompt_length for example in full)
            made.without_answer += not kept
            lost = sum(e.full_length for e in full) - sum(len(e.input_ids) for e in kept)
            if kept and lost:
                made.cut_rows += 1
                made.cut_tokens += lost
            yield from kept


def format_of(name: str, template: str | None) -> Format:
    return templated(template) if name == "template" else FORMATS[name]


def renamed(columns: Columns, mapping: Mapping[str, str]) -> Columns:
    """The columns under our names, where `mapping` (ours -> the file's) has others."""
    if not mapping:
        return columns
    theirs = set(mapping.values())
    kept = {name: value for name, value in columns.items() if name not in theirs}
    return kept | {ours: columns[name] for ours, name in mapping.items() if name in columns}


def _joined(*parts: Faults) -> Faults:
    found = Faults()
    for part in parts:
        found.extend(part)
    return found


def _problem(row: RowId, error: BadRow) -> Problem:
    return Problem(error.what, where=str(row), fix=error.fix)
