"""Rows from files and from the hub: jsonl, json, csv, tsv, parquet, txt, hub id -> (RowId, columns).

Rows come as a stream, so a source may be larger than memory (but for .json, which is one value). They come in two
steps: `raw_rows` cuts a source into rows, which one process does, and `columns_of` reads one, which any process can.

Files may be compressed (gz, zst), and UTF-8 or UTF-16; lines and columns are those of the text inside. A row that
cannot be read comes as a Problem in the place of its columns, so that the caller sees all of them. Lines are counted
as editors count them, from 1, and columns are characters.
"""

import codecs
import csv
import difflib
import gzip
import hashlib
import io
import json
import logging
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from lora_cli.data.types import RowId
from lora_cli.errors import DataError, Problem, SafetyError, first_line
from lora_cli.recipe.schema import Source

Columns = dict[str, Any]
Row = tuple[RowId, Columns | Problem]
Raw = str | Columns | Problem  # a row as it is cut from its source: a line of JSON, or what needs no more reading

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
JSON_LINE = "write one JSON object a line; `data.bad_rows: skip` leaves such rows out"
JSON_LIST = "write one list of JSON objects"
QUOTED = 80  # characters of a line that a message shows
MOST_LINE_BYTES = 10_000_000  # of a line that is one row: 2.5 million tokens, far above any max_length
MOST_BYTES_A_BYTE = 200  # that a compressed file may unpack to: text comes to 3 to 20, and to 1,000 what says nothing
READ = 1 << 17  # bytes that are asked for at once
FREE_BYTES = 100_000_000  # that any may

# How a file begins that is not UTF-8; the longer mark first, for it begins with the shorter
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass
class Gauge:
    """How far a source has been read; its reader sets it."""

    position: Callable[[], int] = lambda: 0
    size: int = 1

    @property
    def share(self) -> float:
        return min(1.0, self.position() / max(1, self.size))


@dataclass(frozen=True)
class DataFile:
    """A file, how the recipe names it, and who watches it being read."""

    path: Path
    name: str
    gauge: Gauge


def rows(source: str | Source, *, folder: Path) -> Iterator[Row]:
    """The rows of one source, in its own order; a path is relative to `folder`, the recipe's.

    Raises DataError, at the first row, for a source that cannot be opened or has no rows in a known form.
    """
    return ((row, columns_of(row, raw)) for row, raw in raw_rows(source, folder=folder))


def raw_rows(source: str | Source, *, folder: Path, gauge: Gauge | None = None) -> Iterator[tuple[RowId, Raw]]:
    """The rows as they are cut from the source; raises what `rows` raises."""
    source, gauge = Source(source=source) if isinstance(source, str) else source, gauge or Gauge()
    if not is_path(source, folder):
        yield from _hub(source, gauge)
        return
    file = DataFile(_file(source, folder), source.source, gauge)
    try:
        yield from READERS[_form(file.path.name)](file)
    except (EOFError, gzip.BadGzipFile, zlib.error, *_zstd_errors()) as error:
        what = f"`{file.name}` is damaged: {quote(first_line(error))}"
        raise DataError(Problem(what, where=str(file.path), fix="get the file anew")) from error
    except UnicodeError as error:  # of UTF-16 and UTF-32; lines that are not UTF-8 are told one by one
        what = f"`{file.name}` is not what its byte order mark says: {quote(first_line(error))}"
        raise DataError(Problem(what, where=str(file.path), fix="save the file as UTF-8")) from error
    except OSError as error:
        raise _unreadable(file.name, file.path, error) from error


def columns_of(row: RowId, raw: Raw) -> Columns | Problem:
    return _object(raw, row) if isinstance(raw, str) else raw


def content(source: Source, folder: Path) -> str:
    """What is equal as long as the source holds the same: a digest of its bytes, or how `datasets` tells its tables."""
    if not is_path(source, folder):
        return str(_dataset(source)._fingerprint)
    path = _file(source, folder)
    try:
        with path.open("rb", buffering=0) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(source.source, path, error) from error


def stamp(source: Source, folder: Path) -> tuple[int, int] | None:
    """Changes when someone writes to the file meanwhile; None for what is no file."""
    if not is_path(source, folder):
        return None
    found = _file(source, folder).stat()
    return found.st_size, found.st_mtime_ns


def label(source: Source) -> str:
    """How messages and reports name a source: as the recipe does, with what it takes of a dataset on the hub."""
    taken = [source.config, None if source.split == "train" else source.split, source.revision]
    named = ", ".join(part for part in taken if part)
    return f"{source.source} ({named})" if named else source.source


def is_path(source: str | Source, folder: Path) -> bool:
    """A path if it is there, ends as a data file does, or cannot be a hub id (`./x`, `/x`, `a/b/c`); else a hub id."""
    name = source if isinstance(source, str) else source.source
    if _form(name) in READERS or not HUB_ID.fullmatch(name):
        return True
    return (folder / name).exists()


def _form(name: str) -> str:
    """`.jsonl` of `a.jsonl`, `a.jsonl.gz` and `a.jsonl.zst`."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in OPENERS else path.suffix


def quote(line: str, column: int = 1) -> str:
    """The part of a foreign line around `column`, fit for a terminal: cut, and with control characters written out."""
    start = max(0, column - QUOTED * 3 // 4) if len(line) > QUOTED else 0
    part = line[start : start + QUOTED]
    inert = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in part)
    return ("…" if start else "") + inert + ("…" if start + QUOTED < len(line) else "")


def _unreadable(name: str, path: Path, error: OSError) -> DataError:
    return DataError(Problem(f"`{name}` cannot be read: {error.strerror}", where=str(path)))


def _file(entry: Source, folder: Path) -> Path:
    source = entry.source
    path = folder / Path(source).expanduser()
    if of_hub := [key for key in ("split", "config", "revision") if key in entry.model_fields_set]:
        what = f"`{source}` is a file, and a file has no `{of_hub[0]}`"
        raise DataError(Problem(what, where=str(path), fix=f"leave `{of_hub[0]}` out"))
    known = f"{', '.join(READERS)} (and those with {' or '.join(OPENERS)} behind it)"
    if path.is_dir():
        inside = [f"`{source.rstrip('/')}/{name}`" for name in _data_files(path)]
        fix = f"name a file: {', '.join(inside[:5])}" if inside else f"name a file that ends in one of {known}"
        raise DataError(Problem(f"`{source}` is a folder, not a data file", where=str(path), fix=fix))
    if not path.is_file():
        near = difflib.get_close_matches(path.name, _data_files(path.parent), n=1)
        fix = (
            f"`{Path(source).parent / near[0]}` is there"
            if near
            else f"paths are relative to the recipe's folder, {folder}"
        )
        raise DataError(Problem(f"data file `{source}` does not exist", where=str(path), fix=fix))
    if _form(path.name) not in READERS:
        raise DataError(
            Problem(
                f"`{source}` has no form known here", where=str(path), fix=f"use a file that ends in one of {known}"
            )
        )
    return path


def _data_files(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if _form(path.name) in READERS)


def _jsonl(file: DataFile) -> Iterator[tuple[RowId, Raw]]:
    for row, line in _row_lines(file):
        if isinstance(line, Problem) or line.strip():
            yield row, line


def _row_lines(file: DataFile) -> Iterator[tuple[RowId, str | Problem]]:
    """Lines of which each is a row; one above MOST_LINE_BYTES is a Problem, and never in memory as a whole."""
    return _lines(file, most=MOST_LINE_BYTES)


def _too_long(begin: bytes, size: int, row: RowId) -> Problem:
    what = f"a row of {size:,} bytes, and a row has at most {MOST_LINE_BYTES:,}"
    begin = quote(begin[: 4 * QUOTED].decode(errors="replace"))
    return Problem(what, where=str(row), line=begin, fix="cut the document into several rows")


def _lines(file: DataFile, most: int | None = None) -> Iterator[tuple[RowId, str | Problem]]:
    """Lines without their ends (LF or CRLF) and without a byte order mark.

    A line that is not UTF-8, that holds a NUL byte, or that has more than `most` bytes, is a Problem.
    """
    with file.path.open("rb", buffering=0) as stored, _inside(stored, file.path) as opened:
        file.gauge.position, file.gauge.size = stored.tell, file.path.stat().st_size
        encoding = next((encoding for mark, encoding in MARKS if opened.peek(4).startswith(mark)), None)
        # kept until the file is closed, for a wrapper that is dropped before warns of a file left open
        wrapped = io.TextIOWrapper(opened, encoding, newline="\n") if encoding else None
        lines = ((line.encode(), 0) for line in wrapped) if wrapped else _limited(opened, most)
        for number, (raw, left_out) in enumerate(lines, 1):
            row = RowId(file.name, number)
            raw = raw.removesuffix(b"\n").removesuffix(b"\r")
            if most is not None and len(raw) + left_out > most:
                yield row, _too_long(raw, len(raw) + left_out, row)
                continue
            try:
                text = raw.decode()
            except UnicodeDecodeError as error:
                yield row, _not_utf8(raw, error, row)
                continue
            text = text.removeprefix("\ufeff") if number == 1 else text
            yield row, _holds_nul(text, row) if "\0" in text else text
        file.gauge.position = lambda: file.gauge.size  # the file is closed now


def _limited(opened: io.BufferedReader, most: int | None) -> Iterator[tuple[bytes, int]]:
    """The lines, of which none is read further than a little above `most`; and how many bytes of each are left out."""
    limit = -1 if most is None else most + 2  # with a line end
    while raw := opened.readline(limit):
        rest, left_out = raw, 0
        while len(rest) == limit and not rest.endswith(b"\n"):
            rest = opened.readline(limit)
            left_out += len(rest.rstrip(b"\r\n"))
        yield raw, left_out


def _inside(stored: io.FileIO, path: Path) -> io.BufferedReader:
    """The bytes inside a file. Reading them raises SafetyError where they are far more than they are packed."""
    opener = OPENERS.get(path.suffix.lower())
    return io.BufferedReader(_Unpacked(opener(stored), path) if opener else stored, READ)


class _Unpacked(io.RawIOBase):
    """The bytes inside a compressed file, as long as they are no more than rows could ever come to."""

    def __init__(self, inside: Any, path: Path) -> None:
        self._inside, self._path = inside, path
        self._left = FREE_BYTES + MOST_BYTES_A_BYTE * path.stat().st_size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._inside.readinto(buffer)
        self._left -= count
        if self._left < 0:
            what = f"it unpacks to more than {MOST_BYTES_A_BYTE} times its size, which no rows do"
            raise SafetyError(
                Problem(what, where=str(self._path), fix="unpack it yourself, and look at what is inside")
            )
        return count

    def close(self) -> None:
        self._inside.close()
        super().close()


def _gz(stored: io.FileIO) -> gzip.GzipFile:
    return gzip.GzipFile(fileobj=stored)


def _zst(stored: io.FileIO) -> Any:
    zstd = _zstd()
    if zstd is None:
        fix = "`pip install zstandard`, or unpack the file with `zstd -d`"
        raise DataError(Problem("a .zst file needs the package `zstandard`", where=str(stored.name), fix=fix))
    return zstd.open(stored, "rb")


def _zstd() -> ModuleType | None:
    """Python's own module (from 3.14 on), or the package; None where neither is there."""
    for name in ("compression.zstd", "zstandard"):
        try:
            return import_module(name)
        except ImportError:
            continue
    return None


def _zstd_errors() -> tuple[type[Exception], ...]:
    """What either module raises for a damaged file; asked only once something has been raised."""
    return (_zstd().ZstdError,) if _zstd() else ()


def _holds_nul(text: str, row: RowId) -> Problem:
    column = text.index("\0") + 1
    fix = "save the file as text, in UTF-8; a JSON string writes it as `\\u0000`"
    return Problem("a NUL byte in a text file", where=f"{row}:{column}", line=quote(text, column), fix=fix)


def _not_utf8(raw: bytes, error: UnicodeDecodeError, row: RowId) -> Problem:
    column = len(raw[: error.start].decode()) + 1
    return Problem(
        f"byte 0x{raw[error.start]:02x} is not UTF-8",
        where=f"{row}:{column}",
        line=quote(raw.decode(errors="replace"), column),
        fix="save the file as UTF-8",
    )


def _object(line: str, row: RowId) -> Columns | Problem:
    try:
        value = _loads(line)
    except json.JSONDecodeError as error:
        return Problem(f"not JSON: {error.msg}", f"{row}:{error.colno}", quote(line, error.colno), JSON_LINE)
    except ValueError as error:
        return Problem(f"not JSON: {error}", str(row), quote(line), JSON_LINE)
    if not isinstance(value, dict):
        return Problem(f"a row is an object, not {_kind(value)}", str(row), quote(line), JSON_LINE)
    return value


def _loads(text: str) -> Any:
    """JSON as the standard has it: no NaN, no key twice, and only text that can be written as UTF-8."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if ESCAPED_SURROGATE.search(text) and LONE_SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise ValueError("half of a surrogate pair (a `\\ud800` … `\\udfff` that stands alone)")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> Columns:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        double = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"key `{quote(double)}` stands twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _json(file: DataFile) -> Iterator[tuple[RowId, Raw]]:
    for number, value in enumerate(_json_list(file), 1):
        row = RowId(file.name, number, is_line=False)
        bad = Problem(f"a row is an object, not {_kind(value)}", where=str(row))
        yield row, value if isinstance(value, dict) else bad


def _json_list(file: DataFile) -> list[Any]:
    source = file.name
    lines = list(_lines(file)) or [(RowId(source, 1), "")]
    for _, line in lines:
        if isinstance(line, Problem):
            raise DataError(line)
    try:
        value = _loads("\n".join(line for _, line in lines))
    except json.JSONDecodeError as error:
        by_line = error.msg == "Extra data"
        raise DataError(
            Problem(
                f"not JSON: {error.msg}",
                where=f"{source}:{error.lineno}:{error.colno}",
                line=quote(lines[error.lineno - 1][1], error.colno),
                fix="a file with one object a line is called .jsonl" if by_line else JSON_LIST,
            )
        ) from error
    except ValueError as error:
        raise DataError(Problem(f"not JSON: {error}", where=source, fix=JSON_LIST)) from error
    lists = [value]
    if isinstance(value, dict):
        lists = list(value.values())
    lists = [found for found in lists if isinstance(found, list)]
    if len(lists) == 1:
        return lists[0]
    raise DataError(
        Problem(
            f"`{source}` holds no list of rows" if not lists else f"`{source}` holds {len(lists)} lists",
            where=str(file.path),
            fix="bring the rows into one list of objects, or into an object with one such list",
        )
    )


def _csv(file: DataFile, delimiter: str = ",") -> Iterator[tuple[RowId, Raw]]:
    """Quoted cells may hold line ends: a record is named by its first line. Every cell is text."""
    csv.field_size_limit(sys.maxsize)
    read = 0  # lines that the records so far have taken
    header: list[str] | None = None
    reader = csv.reader(_csv_lines(file), delimiter=delimiter, strict=True)
    while True:
        row = RowId(file.name, read + 1)
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            where, fix = (
                str(RowId(file.name, reader.line_num)),
                "close every quotation mark, and double those inside a cell",
            )
            raise DataError(Problem(f"not CSV: {error}", where=where, fix=fix)) from error
        read = reader.line_num
        if header is None:
            header = _header(cells, row)
        elif cells:
            yield row, _record(header, cells, row)


def _csv_lines(file: DataFile) -> Iterator[str]:
    for _, line in _lines(file):
        if isinstance(line, Problem):
            raise DataError(line)
        yield line + "\n"


def _header(cells: list[str], row: RowId) -> list[str]:
    if "" in cells or len(set(cells)) < len(cells):
        raise DataError(
            Problem("the first line must name every column, each once", where=str(row), line=quote(", ".join(cells)))
        )
    return cells


def _record(header: list[str], cells: list[str], row: RowId) -> Columns | Problem:
    if len(cells) == len(header):
        return dict(zip(header, cells, strict=True))
    return Problem(
        f"{len(cells)} cells where the first line names {len(header)} columns",
        where=str(row),
        line=quote(", ".join(cells)),
        fix="put a cell that holds the delimiter or a line end in double quotes",
    )


def _parquet(file: DataFile) -> Iterator[tuple[RowId, Raw]]:
    import pyarrow
    from pyarrow import parquet

    if file.path.suffix.lower() in OPENERS:
        what = f"`{file.name}` is compressed, and a Parquet file is so by itself"
        raise DataError(Problem(what, where=str(file.path), fix="unpack it"))
    number = 0
    try:
        with parquet.ParquetFile(file.path) as table:
            file.gauge.position, file.gauge.size = lambda: number, table.metadata.num_rows
            for batch in table.iter_batches(batch_size=1024):
                for columns in batch.to_pylist():
                    number += 1
                    yield RowId(file.name, number, is_line=False), columns
    except pyarrow.ArrowException as error:
        raise DataError(
            Problem(f"not Parquet: {quote(str(error))}", where=str(file.path), fix="get the file anew")
        ) from error


def _txt(file: DataFile) -> Iterator[tuple[RowId, Raw]]:
    """Each line that is not blank is one document; documents of several lines belong in jsonl, as {"text": …}."""
    for row, line in _row_lines(file):
        if isinstance(line, Problem):
            yield row, line
        elif line.strip():
            yield row, {"text": line}


def _hub(source: Source, gauge: Gauge) -> Iterator[tuple[RowId, Raw]]:
    """The split of a dataset on the hub, which `datasets` maps from its own files."""
    split, number = _dataset(source), 0
    gauge.position, gauge.size = lambda: number, len(split)
    for columns in split:
        number += 1
        yield RowId(label(source), number, is_line=False), columns


def _dataset(source: Source) -> Any:
    import datasets

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each try; the error tells of the last
    try:
        return datasets.load_dataset(source.source, name=source.config, split=source.split, revision=source.revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            Problem(
                f"dataset `{source.source}` cannot be had from the hub: {quote(first_line(error))}",
                fix="check the name and the network; `hf auth login` for a gated or private one; or name a local file",
            )
        ) from error


# The ending that a compressed file has behind that of its form -> a stream of what is inside
OPENERS: dict[str, Callable[[io.FileIO], Any]] = {".gz": _gz, ".zst": _zst}

READERS: dict[str, Callable[[DataFile], Iterator[tuple[RowId, Raw]]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": partial(_csv, delimiter="\t"),
    ".parquet": _parquet,
    ".txt": _txt,
}
