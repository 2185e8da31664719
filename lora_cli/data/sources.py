"""Rows from files and from the hub: jsonl, json, csv, tsv, parquet, txt, hub id -> (RowId, columns).

Files may be compressed (gz, zst), and UTF-8 or UTF-16; lines and columns are those of the text inside. A row that cannot be read comes as a Problem in the place of its columns, so that the caller sees all of them. Lines are
counted as editors count them, from 1, and columns are characters.
"""

import codecs
import csv
import difflib
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from lora_cli.data.types import RowId
from lora_cli.errors import DataError, Problem, first_line
from lora_cli.recipe.schema import Source

Columns = dict[str, Any]
Row = tuple[RowId, Columns | Problem]

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
JSON_LINE = "write one JSON object a line; `data.bad_rows: skip` leaves such rows out"
JSON_LIST = "write one list of JSON objects"
QUOTED = 80  # characters of a line that a message shows
MOST_LINE_BYTES = 10_000_000  # of a line that is one row: 2.5 million tokens, far above any max_length

# How a file begins that is not UTF-8; the longer mark first, for it begins with the shorter
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def rows(source: str | Source, *, folder: Path) -> Iterator[Row]:
    """The rows of one source, in its own order; a path is relative to `folder`, the recipe's.

    Raises DataError, at the first row, for a source that cannot be opened or has no rows in a known form.
    """
    source = Source(source=source) if isinstance(source, str) else source
    if not is_path(source, folder):
        yield from _hub(source)
        return
    path = _file(source.source, folder)
    if of_hub := [key for key in ("split", "config", "revision") if key in source.model_fields_set]:
        what = f"`{source.source}` is a file, and a file has no `{of_hub[0]}`"
        raise DataError(Problem(what, where=str(path), fix=f"leave `{of_hub[0]}` out"))
    try:
        yield from READERS[_form(path.name)](path, source.source)
    except (EOFError, gzip.BadGzipFile, zlib.error, *_zstd_errors()) as error:
        what = f"`{source.source}` is damaged: {quote(first_line(error))}"
        raise DataError(Problem(what, where=str(path), fix="get the file anew")) from error
    except UnicodeError as error:  # of UTF-16 and UTF-32; lines that are not UTF-8 are told one by one
        what = f"`{source.source}` is not what its byte order mark says: {quote(first_line(error))}"
        raise DataError(Problem(what, where=str(path), fix="save the file as UTF-8")) from error
    except OSError as error:
        raise DataError(Problem(f"`{source.source}` cannot be read: {error.strerror}", where=str(path))) from error


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


def _file(source: str, folder: Path) -> Path:
    path = folder / Path(source).expanduser()
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


def _jsonl(path: Path, source: str) -> Iterator[Row]:
    for row, line in _row_lines(path, source):
        if isinstance(line, Problem):
            yield row, line
        elif line.strip():
            yield row, _object(line, row)


def _row_lines(path: Path, source: str) -> Iterator[tuple[RowId, str | Problem]]:
    """Lines of which each is a row; one above MOST_LINE_BYTES is a Problem."""
    for row, line in _lines(path, source):
        too_long = isinstance(line, str) and len(line) > MOST_LINE_BYTES // 4 and len(line.encode()) > MOST_LINE_BYTES
        yield row, _too_long(line, row) if too_long else line


def _too_long(line: str, row: RowId) -> Problem:
    what = f"a row of {len(line.encode()):,} bytes, and a row has at most {MOST_LINE_BYTES:,}"
    return Problem(what, where=str(row), line=quote(line), fix="cut the document into several rows")


def _lines(path: Path, source: str) -> Iterator[tuple[RowId, str | Problem]]:
    """Lines without their ends (LF or CRLF) and without a byte order mark.

    A line that is not UTF-8, or that holds a NUL byte, is a Problem.
    """
    with _opened(path) as file:
        encoding = next((encoding for mark, encoding in MARKS if file.peek(4).startswith(mark)), None)
        # kept until the file is closed, for a wrapper that is dropped before warns of a file left open
        wrapped = io.TextIOWrapper(file, encoding, newline="\n") if encoding else None
        lines = (line.encode() for line in wrapped) if wrapped else file
        for number, raw in enumerate(lines, 1):
            row = RowId(source, number)
            raw = raw.removesuffix(b"\n").removesuffix(b"\r")
            try:
                text = raw.decode()
            except UnicodeDecodeError as error:
                yield row, _not_utf8(raw, error, row)
                continue
            text = text.removeprefix("\ufeff") if number == 1 else text
            yield row, _holds_nul(text, row) if "\0" in text else text


def _opened(path: Path) -> io.BufferedReader:
    """The bytes inside a file."""
    opener = OPENERS.get(path.suffix.lower())
    return io.BufferedReader(opener(path) if opener else path.open("rb", buffering=0))


def _zst(path: Path) -> Any:
    zstd = _zstd()
    if zstd is None:
        fix = "`pip install zstandard`, or unpack the file with `zstd -d`"
        raise DataError(Problem("a .zst file needs the package `zstandard`", where=str(path), fix=fix))
    return zstd.open(path, "rb")


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


def _json(path: Path, source: str) -> Iterator[Row]:
    for number, value in enumerate(_json_list(path, source), 1):
        row = RowId(source, number, is_line=False)
        bad = Problem(f"a row is an object, not {_kind(value)}", where=str(row))
        yield row, value if isinstance(value, dict) else bad


def _json_list(path: Path, source: str) -> list[Any]:
    lines = list(_lines(path, source)) or [(RowId(source, 1), "")]
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
            where=str(path),
            fix="bring the rows into one list of objects, or into an object with one such list",
        )
    )


def _csv(path: Path, source: str, delimiter: str = ",") -> Iterator[Row]:
    """Quoted cells may hold line ends: a record is named by its first line. Every cell is text."""
    csv.field_size_limit(sys.maxsize)
    read = 0  # lines that the records so far have taken
    header: list[str] | None = None
    reader = csv.reader(_csv_lines(path, source), delimiter=delimiter, strict=True)
    while True:
        row = RowId(source, read + 1)
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            where, fix = (
                str(RowId(source, reader.line_num)),
                "close every quotation mark, and double those inside a cell",
            )
            raise DataError(Problem(f"not CSV: {error}", where=where, fix=fix)) from error
        read = reader.line_num
        if header is None:
            header = _header(cells, row)
        elif cells:
            yield row, _record(header, cells, row)


def _csv_lines(path: Path, source: str) -> Iterator[str]:
    for _, line in _lines(path, source):
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


def _parquet(path: Path, source: str) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    if path.suffix.lower() in OPENERS:
        what = f"`{source}` is compressed, and a Parquet file is so by itself"
        raise DataError(Problem(what, where=str(path), fix="unpack it"))
    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for columns in batch.to_pylist():
                    number += 1
                    yield RowId(source, number, is_line=False), columns
    except pyarrow.ArrowException as error:
        raise DataError(
            Problem(f"not Parquet: {quote(str(error))}", where=str(path), fix="get the file anew")
        ) from error


def _txt(path: Path, source: str) -> Iterator[Row]:
    """Each line that is not blank is one document; documents of several lines belong in jsonl, as {"text": …}."""
    for row, line in _row_lines(path, source):
        if isinstance(line, Problem):
            yield row, line
        elif line.strip():
            yield row, {"text": line}


def _hub(source: Source) -> Iterator[Row]:
    """The split of a dataset on the hub."""
    import datasets

    try:
        split = datasets.load_dataset(source.source, name=source.config, split=source.split, revision=source.revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            Problem(
                f"dataset `{source.source}` cannot be had from the hub: {quote(first_line(error))}",
                fix="check the name and the network; `hf auth login` for a gated or private one; or name a local file",
            )
        ) from error
    for number, columns in enumerate(split, 1):
        yield RowId(label(source), number, is_line=False), columns


# The ending that a compressed file has behind that of its form -> a stream of what is inside
OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.GzipFile, ".zst": _zst}

READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": partial(_csv, delimiter="\t"),
    ".parquet": _parquet,
    ".txt": _txt,
}
