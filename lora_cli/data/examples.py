"""Examples as flat arrays, in memory or mapped from files, so that millions of them cost no Python objects.

    tokens    a a a a b b c c c        one example behind the other
    runs      0×2 1×2 0×1 1×1 …        neighbouring tokens of an example that have one weight and stand in one segment
    records   a b c                    one an example: where its tokens and runs begin, its row, its label …

Seen from outside it is a sequence of Example, each made when it is asked for. What is asked of all of them at once
comes as arrays: `lengths`, `column`, `blocks`.
"""

import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_cli.data.types import CHOSEN, REJECTED, Example, RowId

Array = NDArray[Any]

TOKEN = np.dtype("<u4")
RUN = np.dtype([("weight", "<f8"), ("length", "<u4"), ("segment", "u1")])
RECORD = np.dtype(
    [
        ("token", "<u8"),  # where its tokens begin, and how many they are
        ("length", "<u4"),
        ("run", "<u8"),  # where its runs begin, and how many they are
        ("runs", "<u4"),
        ("trained", "<u4"),  # tokens with a weight
        ("cut", "<u4"),
        ("row", "<u8"),
        ("origin", "<u4"),
        ("label", "<i4"),  # UNLABELLED where nothing is classified
        ("side", "u1"),  # the number among SIDES
    ]
)
FILES = {"tokens": TOKEN, "runs": RUN, "records": RECORD}
UNLABELLED = -1
SIDES = ("", CHOSEN, REJECTED)
BLOCK = 1 << 20  # tokens that are looked at together
READ = 1 << 24  # bytes that are checked together


class Origin(NamedTuple):
    """What the examples of one source have in common."""

    source: str
    is_line: bool
    repeats: float


@dataclass(frozen=True, eq=False)
class Arrays:
    tokens: Array  # [tokens] TOKEN
    runs: Array  # [runs] RUN
    records: Array  # [examples] RECORD


@dataclass(frozen=True, eq=False)
class Store:
    """The examples of one call of `load_examples`, or of a list."""

    arrays: Arrays
    origins: tuple[Origin, ...]
    labels: tuple[int, ...] = ()  # the numbers of the labels that the records number as they came; none: they are right


@dataclass(frozen=True, eq=False)
class Block:
    """Some neighbouring examples: `place` is the first one's, and each begins at its entry of `starts`."""

    place: int
    starts: Array  # [examples]
    lengths: Array  # [examples]
    tokens: Array  # [time]
    weights: Array  # [time] float64

    @property
    def examples(self) -> Array:
        """[time]: the example of each token, counted from 0 in this block."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def example_of(self, token: int) -> int:
        """The example that holds the token at this place in the block."""
        return int(np.searchsorted(self.starts, token, side="right")) - 1

    @property
    def within(self) -> Array:
        """[time]: the place of each token in its example."""
        return np.arange(len(self.tokens)) - np.repeat(self.starts, self.lengths)


class Examples(Sequence[Example]):
    """The examples at `places` of some stores, which are numbered through."""

    def __init__(self, stores: Sequence[Store], places: Array | None = None) -> None:
        self.stores = tuple(stores)
        self._ends = np.cumsum([len(store.arrays.records) for store in self.stores]).tolist()
        self.places = np.arange(self._ends[-1] if self._ends else 0) if places is None else places

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Examples":
        """The examples themselves if they are flat already, else a copy that is."""
        if isinstance(examples, Examples):
            return examples
        origins: dict[Origin, int] = {}
        numbers = [origins.setdefault(Origin(e.row.source, e.row.is_line, e.repeats), len(origins)) for e in examples]
        return cls([Store(flat(examples, numbers), tuple(origins))])

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index):  # type: ignore[override]
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        return self._example(int(self.places[index]))

    def __iter__(self) -> Iterator[Example]:
        return (self._example(place) for block in self._blocks_of_places() for place in block)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, others: "Examples") -> "Examples":
        places = others.places + (self._ends[-1] if self._ends else 0)
        return Examples([*self.stores, *others.stores], np.concatenate([self.places, places]))

    def take(self, places: Array) -> "Examples":
        return Examples(self.stores, self.places[places])

    def column(self, name: str) -> Array:
        """[examples]: a field of RECORD, as integers that can be summed; `origin` is a place in `origins`."""
        parts = [store.arrays.records[name].astype(np.int64) for store in self.stores]
        if name == "origin":
            before = np.cumsum([0, *(len(store.origins) for store in self.stores)])
            parts = [part + start for part, start in zip(parts, before, strict=False)]
        return (parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.int64), *parts]))[self.places]

    @cached_property
    def origins(self) -> tuple[Origin, ...]:
        return tuple(chain.from_iterable(store.origins for store in self.stores))

    @cached_property
    def lengths(self) -> Array:
        return self.column("length")

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def trained_tokens(self) -> int:
        return int(self.column("trained").sum())

    @property
    def repeats(self) -> Array:
        """[examples]: how often an epoch takes each."""
        return np.array([origin.repeats for origin in self.origins] or [1.0])[self.column("origin")]

    @cached_property
    def labels(self) -> Array:
        """[examples]: the numbers of their labels, UNLABELLED for those that have none."""
        parts = []
        for store in self.stores:
            codes = store.arrays.records["label"].astype(np.int64)
            numbers = np.array([*(store.labels or range(codes.max(initial=-1) + 1)), UNLABELLED])
            parts.append(numbers[codes])
        return np.concatenate([np.zeros(0, np.int64), *parts])[self.places]

    @property
    def row_keys(self) -> Array:
        """[examples]: a number of its row, equal for the examples of one row and for no others."""
        names: dict[tuple[str, bool], int] = {}
        numbers = [names.setdefault((origin.source, origin.is_line), len(names)) for origin in self.origins]
        return (np.array(numbers or [0])[self.column("origin")] << 44) | self.column("row")

    def of_rows(self, rows: Iterable[RowId]) -> "Examples":
        """Those that come from one of the rows."""
        found = np.zeros(len(self), bool)
        origins, numbers = self.column("origin"), self.column("row")
        for row in rows:
            own = [i for i, o in enumerate(self.origins) if (o.source, o.is_line) == (row.source, row.is_line)]
            found |= (numbers == row.number) & np.isin(origins, own)
        return self.take(np.flatnonzero(found))

    def of_source(self, name: str) -> "Examples":
        own = [number for number, origin in enumerate(self.origins) if origin.source == name]
        return self.take(np.flatnonzero(np.isin(self.column("origin"), own)))

    def blocks(self) -> Iterator[Block]:
        """All examples in order, some at a time."""
        done = 0
        for places in self._blocks_of_places():
            yield self._block(done, places)
            done += len(places)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every token with its weight, in order, and of how sources are mixed; whatever file it came from.

        An example is (tokens, each token as int64, each weight as float64[, repeats where it is not 1][, its label and
        segments, where it is classified]).
        """
        digest, repeats = sha256(), self.repeats
        if (self.labels != UNLABELLED).any():
            return self._labelled_fingerprint()
        for block in self.blocks():
            mixed = repeats[block.place :][: len(block.lengths)]
            sizes = 1 + 2 * block.lengths + (mixed != 1)
            heads = np.cumsum(sizes) - sizes
            words = np.empty(sizes.sum(), "<i8")
            words[heads] = block.lengths
            at = np.repeat(heads + 1, block.lengths) + block.within
            words[at] = block.tokens
            words.view("<f8")[at + np.repeat(block.lengths, block.lengths)] = block.weights
            words.view("<f8")[(heads + sizes - 1)[mixed != 1]] = mixed[mixed != 1]
            digest.update(words)
        return digest.hexdigest()

    def _labelled_fingerprint(self) -> str:
        """The same, one by one: what tells a label is text."""
        digest = sha256()
        for example in self:
            digest.update(np.array([len(example.input_ids), *example.input_ids], "<i8").tobytes())
            digest.update(np.array(example.weights, "<f8").tobytes())
            if example.repeats != 1:
                digest.update(np.float64(example.repeats).tobytes())
            if example.label is not None:
                digest.update(repr((example.label, example.segments)).encode())
        return digest.hexdigest()

    def _store_of(self, place: int) -> tuple[Store, int]:
        """A place as its store and the place there."""
        number = bisect_right(self._ends, place)
        return self.stores[number], place - (self._ends[number - 1] if number else 0)

    def _example(self, place: int) -> Example:
        store, local = self._store_of(place)
        token, length, run, count, _, cut, row, origin, label, side = store.arrays.records[local].item()
        runs = store.arrays.runs[run : run + count]
        found = store.origins[origin]
        return Example(
            input_ids=store.arrays.tokens[token : token + length].tolist(),
            weights=np.repeat(runs["weight"], runs["length"]).tolist(),
            row=RowId(found.source, row, found.is_line),
            cut=cut,
            repeats=found.repeats,
            label=None if label == UNLABELLED else (store.labels[label] if store.labels else label),
            side=SIDES[side],
            segments=tuple(np.repeat(runs["segment"], runs["length"]).tolist()) if runs["segment"].any() else None,
        )

    def _blocks_of_places(self) -> Iterator[list[int]]:
        """The places of about BLOCK tokens each, of one store each."""
        start, ends = 0, np.cumsum(self.lengths)
        stores = np.searchsorted(self._ends, self.places, side="right")
        borders = [*(np.flatnonzero(np.diff(stores)) + 1).tolist(), len(self)]
        while start < len(self):
            before = ends[start - 1] if start else 0
            end = max(start + 1, int(np.searchsorted(ends, before + BLOCK, side="right")))
            end = min(end, borders[bisect_right(borders, start)])
            yield self.places[start:end].tolist()
            start = end

    def _block(self, done: int, places: Sequence[int]) -> Block:
        store, first = self._store_of(places[0])
        records = store.arrays.records[np.asarray(places) - places[0] + first]
        lengths = records["length"].astype(np.int64)
        runs = _gathered(store.arrays.runs, records["run"], records["runs"])
        return Block(
            place=done,
            starts=np.cumsum(lengths) - lengths,
            lengths=lengths,
            tokens=_gathered(store.arrays.tokens, records["token"], records["length"]),
            weights=np.repeat(runs["weight"], runs["length"]),
        )


def flat(examples: Sequence[Example], origins: Sequence[int]) -> Arrays:
    """The arrays of some examples, each with the number of its origin."""
    lengths = np.array([len(example.input_ids) for example in examples], np.int64)
    total = int(lengths.sum())
    starts = np.cumsum(lengths) - lengths
    tokens = np.fromiter(chain.from_iterable(example.input_ids for example in examples), TOKEN, total)
    weights = np.fromiter(chain.from_iterable(example.weights for example in examples), np.float64, total)
    segments = np.fromiter(
        chain.from_iterable(e.segments or repeat(0, len(e.input_ids)) for e in examples), "u1", total
    )
    changes = np.ones(total, bool)
    changes[1:] = (weights[1:] != weights[:-1]) | (segments[1:] != segments[:-1])
    changes[starts[lengths > 0]] = True
    begins = np.flatnonzero(changes)
    runs = np.empty(len(begins), RUN)
    runs["weight"], runs["segment"], runs["length"] = weights[begins], segments[begins], np.diff(begins, append=total)
    trained = np.concatenate([[0], np.cumsum(weights > 0)])
    records = np.zeros(len(examples), RECORD)
    records["token"], records["length"] = starts, lengths
    records["run"] = np.searchsorted(begins, starts)
    records["runs"] = np.diff(records["run"].astype(np.int64), append=len(begins))
    records["trained"] = trained[starts + lengths] - trained[starts]
    records["cut"] = [example.cut for example in examples]
    records["row"] = [example.row.number for example in examples]
    records["origin"] = origins
    records["label"] = [UNLABELLED if example.label is None else example.label for example in examples]
    records["side"] = [SIDES.index(example.side) for example in examples]
    return Arrays(tokens, runs, records)


def with_labels(arrays: Arrays, codes: Sequence[int]) -> Arrays:
    """The arrays with other numbers for their labels."""
    records = arrays.records.copy()
    records["label"] = np.array([*codes, UNLABELLED], "<i4")[records["label"]]
    return replace(arrays, records=records)


class Writer(AbstractContextManager):
    """Puts arrays one behind the other into files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._opened = ExitStack()
        self._files = {name: self._opened.enter_context((folder / name).open("wb")) for name in FILES}
        self._sums = dict.fromkeys(FILES, 0)
        self._counts = dict.fromkeys(FILES, 0)

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def append(self, arrays: Arrays) -> None:
        records = arrays.records.copy()
        records["token"] += np.uint64(self._counts["tokens"])
        records["run"] += np.uint64(self._counts["runs"])
        for name, array in (("tokens", arrays.tokens), ("runs", arrays.runs), ("records", records)):
            content = array.tobytes()
            self._files[name].write(content)
            self._sums[name] = zlib.crc32(content, self._sums[name])
            self._counts[name] += len(array)

    @property
    def manifest(self) -> dict[str, list[int]]:
        """What is in the files: entries and check sum of each."""
        return {name: [self._counts[name], self._sums[name]] for name in FILES}


def mapped(folder: Path, manifest: Mapping[str, Sequence[int]]) -> Arrays:
    """The arrays of a folder, mapped. ValueError where they are not those of the manifest.

    They stay readable when the folder is deleted meanwhile.
    """
    found = {}
    for name, kind in FILES.items():
        file, (count, checked) = folder / name, manifest[name]
        if file.stat().st_size != count * kind.itemsize:
            raise ValueError(f"{file}: {file.stat().st_size} bytes instead of {count * kind.itemsize}")
        found[name] = np.asarray(np.memmap(file, kind, "r", shape=(count,))) if count else np.zeros(0, kind)
        if _checked(found[name]) != checked:
            raise ValueError(f"{file}: damaged")
    return Arrays(**found)


def _checked(array: Array) -> int:
    content, found = array.view(np.uint8), 0
    for start in range(0, len(content), READ):
        found = zlib.crc32(content[start : start + READ], found)
    return found


def _gathered(array: Array, starts: Array, lengths: Array) -> Array:
    """The pieces of an array, one behind the other; a view where they lie so already."""
    starts, lengths = starts.astype(np.int64), lengths.astype(np.int64)
    if (starts[1:] == starts[:-1] + lengths[:-1]).all():
        return array[starts[0] : starts[-1] + lengths[-1]]
    offsets = np.cumsum(lengths) - lengths
    return array[np.repeat(starts - offsets, lengths) + np.arange(lengths.sum())]


def fingerprint(examples: Sequence[Example]) -> str:
    return Examples.of(examples).fingerprint


def sources_in(examples: Sequence[Example]) -> list[str]:
    """The sources of the examples, in order, where there are several; else none, for there is nothing to tell apart."""
    examples = Examples.of(examples)
    numbers, first = np.unique(examples.column("origin"), return_index=True)
    found = list(dict.fromkeys(examples.origins[number].source for number in numbers[np.argsort(first)]))
    return found if len(found) > 1 else []
