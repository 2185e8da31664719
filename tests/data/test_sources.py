import gzip
import json
import sys

import pytest

from lora_cli.data import sources
from lora_cli.data.sources import JSON_LINE, MOST_LINE_BYTES, is_path, label, quote, rows
from lora_cli.data.types import RowId
from lora_cli.errors import DataError, Problem, SafetyError
from lora_cli.recipe.schema import Source

TURNS = {"messages": [{"role": "user", "content": "é 猫\n"}, {"role": "assistant", "content": "the cat"}]}
WANTED = [{"prompt": 'one, "two"\nthree', "completion": "é 猫"}, {"prompt": "four", "completion": " "}]


def read(folder, source="train.jsonl"):
    return list(rows(source, folder=folder))


def problems(folder, source="train.jsonl"):
    """What cannot be read, whether it comes as a row or ends the reading."""
    try:
        return [columns for _, columns in read(folder, source) if isinstance(columns, Problem)]
    except DataError as error:
        return list(error.problems)


def write_jsonl(path):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in WANTED))


def write_json(path):
    path.write_text(json.dumps(WANTED))


def write_json_object(path):
    path.write_text(json.dumps({"version": "1", "rows": WANTED}, indent=1))


def write_csv(path):
    path.write_text('prompt,completion\n"one, ""two""\nthree",é 猫\nfour, \n')


def write_tsv(path):
    path.write_text('prompt\tcompletion\n"one, ""two""\nthree"\té 猫\nfour\t \n')


def write_parquet(path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(WANTED), path)


FILES = {
    "a.jsonl": write_jsonl,
    "a.ndjson": write_jsonl,
    "a.json": write_json,
    "b.json": write_json_object,
    "a.csv": write_csv,
    "a.tsv": write_tsv,
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize(("name", "write"), FILES.items(), ids=FILES)
def test_every_form_of_file_gives_the_same_rows(tmp_path, name, write):
    write(tmp_path / name)

    assert [columns for _, columns in read(tmp_path, name)] == WANTED


def packed_gz(content):
    return gzip.compress(content)


def packed_zst(content):
    return pytest.importorskip("zstandard").compress(content)


PACKED = {".gz": packed_gz, ".zst": packed_zst}
EACH_PACKED = pytest.mark.parametrize(("ending", "pack"), PACKED.items(), ids=PACKED)


@EACH_PACKED
@pytest.mark.parametrize("name", [name for name in FILES if name != "a.parquet"])
def test_a_compressed_file_gives_the_same_rows(tmp_path, name, ending, pack):
    FILES[name](tmp_path / name)
    (tmp_path / f"b{name}{ending}").write_bytes(pack((tmp_path / name).read_bytes()))

    assert [columns for _, columns in read(tmp_path, f"b{name}{ending}")] == WANTED


@EACH_PACKED
def test_line_and_column_are_those_of_the_text_inside(tmp_path, ending, pack):
    lines = '{"text": "é 猫"}\n' * 50_000 + '{"text": "é 猫" "b"}\n' + '{"text": "a"}\n' * 9_999
    (tmp_path / f"a.jsonl{ending}").write_bytes(pack(lines.encode()))

    [problem] = problems(tmp_path, f"a.jsonl{ending}")

    assert problem.where == f"a.jsonl{ending}:50001:16"


@EACH_PACKED
def test_a_compressed_file_that_ends_early_or_is_none_is_damaged(tmp_path, ending, pack):
    whole = pack(b"".join(b'{"text": "%d"}\n' % (n * n) for n in range(10_000)))
    (tmp_path / f"early.jsonl{ending}").write_bytes(whole[: len(whole) // 2])
    (tmp_path / f"none.jsonl{ending}").write_bytes(b'{"text": "a"}\n')

    [none] = problems(tmp_path, f"none.jsonl{ending}")

    assert none.what.startswith(f"`none.jsonl{ending}` is damaged: ")
    assert none.fix == "get the file anew"
    if ending == ".gz":
        [early] = problems(tmp_path, "early.jsonl.gz")
        assert early.what == (
            "`early.jsonl.gz` is damaged: Compressed file ended before the end-of-stream marker was reached"
        )


def test_a_zst_file_without_its_package_names_the_package(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").touch()
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)

    assert problems(tmp_path, "a.jsonl.zst") == [
        Problem(
            "a .zst file needs the package `zstandard`",
            where=str(tmp_path / "a.jsonl.zst"),
            fix="`pip install zstandard`, or unpack the file with `zstd -d`",
        )
    ]


def test_a_compressed_parquet_file_is_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet.gz")

    [problem] = problems(tmp_path, "a.parquet.gz")

    assert problem.what == "`a.parquet.gz` is compressed, and a Parquet file is so by itself"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_file_with_a_byte_order_mark_gives_the_same_rows(tmp_path, name, encoding):
    FILES[name](tmp_path / name)
    (tmp_path / f"b{name}").write_text((tmp_path / name).read_text(), encoding=encoding, newline="")

    assert [columns for _, columns in read(tmp_path, f"b{name}")] == WANTED


def test_line_and_column_are_exact_in_utf16(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "猫"}\r\n{"text": "猫" "b"}\r\n', encoding="utf-16")

    [problem] = problems(tmp_path)

    assert problem.where == "train.jsonl:2:14"


def test_a_damaged_utf16_file_is_one_clear_error(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b"\xff\xfe" + '{"text": "a"}\n'.encode("utf-16-le") + b"\x00\xd8a\0")

    [problem] = problems(tmp_path)

    assert problem.what.startswith("`train.jsonl` is not what its byte order mark says: ")
    assert problem.fix == "save the file as UTF-8"


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_line_with_a_nul_byte_is_named_by_its_character(tmp_path, name):
    (tmp_path / name).write_bytes('{"text": "a"}\n{"text": "猫\0"}\n'.encode())

    assert problems(tmp_path, name) == [
        Problem(
            "a NUL byte in a text file",
            where=f"{name}:2:12",
            line='{"text": "猫\\x00"}',
            fix="save the file as text, in UTF-8; a JSON string writes it as `\\u0000`",
        )
    ]


def test_a_row_is_of_a_size_that_can_be_a_row(tmp_path):
    most = '{"text": "' + "a" * (MOST_LINE_BYTES - 12) + '"}'
    (tmp_path / "train.jsonl").write_text(f"{most}\n{most} \n")

    [(first, columns), (_, problem)] = read(tmp_path)

    assert (first.number, len(columns["text"])) == (1, MOST_LINE_BYTES - 12)
    assert (problem.what, problem.where) == (
        "a row of 10,000,001 bytes, and a row has at most 10,000,000",
        "train.jsonl:2",
    )


def test_of_a_line_that_is_no_row_only_the_beginning_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MOST_LINE_BYTES", 20)
    content = '{"text": "a"}\n' + "é" * 1000 + '\r\n{"text": "b"}\r\n' + "c" * 21
    (tmp_path / "train.jsonl").write_text(content, encoding="utf-8", newline="")

    assert [found if isinstance(found, dict) else found.what for _, found in read(tmp_path)] == [
        {"text": "a"},
        "a row of 2,000 bytes, and a row has at most 20",
        {"text": "b"},
        "a row of 21 bytes, and a row has at most 20",
    ]


@pytest.mark.parametrize("ending", PACKED)
def test_a_compressed_file_that_unpacks_to_what_no_rows_would_is_refused(ending, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FREE_BYTES", 10_000)
    name, fair = f"bomb.jsonl{ending}", '{"text": "%s"}\n' % ("the cat " * 100)
    (tmp_path / name).write_bytes(PACKED[ending]((fair * 10).encode()))
    assert len(list(rows(name, folder=tmp_path))) == 10

    (tmp_path / name).write_bytes(PACKED[ending](b" " * 4_000_000))

    with pytest.raises(SafetyError, match="it unpacks to more than 200 times its size"):
        list(rows(name, folder=tmp_path))


@pytest.mark.parametrize("key", ["split", "config", "revision"])
def test_a_file_has_no_split(tmp_path, key):
    write_jsonl(tmp_path / "train.jsonl")

    with pytest.raises(DataError) as error:
        list(rows(Source(source="train.jsonl", **{key: "x"}), folder=tmp_path))

    assert error.value.problems == (
        Problem(
            f"`train.jsonl` is a file, and a file has no `{key}`",
            where=str(tmp_path / "train.jsonl"),
            fix=f"leave `{key}` out",
        ),
    )


def test_a_dataset_is_asked_for_its_split_configuration_and_revision(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *path, **keys: asked.append((path, keys)) or [{"text": "a"}])
    source = Source(source="squad", split="test", config="en", revision="v2")

    [(row, columns)] = rows(source, folder=tmp_path)

    assert asked == [(("squad",), {"name": "en", "split": "test", "revision": "v2"})]
    assert (str(row), columns) == ("squad (en, test, v2) row 1", {"text": "a"})
    assert label(Source(source="squad")) == "squad"


def test_a_text_file_is_a_document_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"the cat\r\n\r\n  sat\n")

    assert read(tmp_path, "a.txt") == [(RowId("a.txt", 1), {"text": "the cat"}), (RowId("a.txt", 3), {"text": "  sat"})]


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_change_nothing(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n{"text": "c"}')

    assert read(tmp_path) == [(RowId("train.jsonl", n), {"text": t}) for n, t in ((1, "a"), (3, "b"), (4, "c"))]


def test_rows_of_a_file_that_has_no_lines_are_named_by_their_number(tmp_path):
    write_parquet(tmp_path / "a.parquet")

    assert [str(row) for row, _ in read(tmp_path, "a.parquet")] == ["a.parquet row 1", "a.parquet row 2"]


def test_a_csv_record_is_named_by_its_first_line(tmp_path):
    write_csv(tmp_path / "a.csv")

    assert [str(row) for row, _ in read(tmp_path, "a.csv")] == ["a.csv:2", "a.csv:4"]


@pytest.mark.parametrize(("line", "count"), [(1, 3), (50_001, 60_000), (60_000, 60_000)])
def test_a_malformed_line_is_named_by_its_line_and_its_character(tmp_path, line, count):
    lines = ['{"text": "é 猫"}\n'] * count
    lines[line - 1] = '{"text": "é 猫" "b"}\n'
    (tmp_path / "train.jsonl").write_text("".join(lines))

    assert problems(tmp_path) == [
        Problem("not JSON: Expecting ',' delimiter", f"train.jsonl:{line}:16", '{"text": "é 猫" "b"}', JSON_LINE)
    ]


def test_a_byte_that_is_not_utf8_is_named_by_its_character(tmp_path):
    (tmp_path / "train.jsonl").write_bytes('{"text": "a"}\n{"text": "é 猫'.encode() + b'\xff"}\n')

    assert problems(tmp_path) == [
        Problem(
            "byte 0xff is not UTF-8", where="train.jsonl:2:14", line='{"text": "é 猫�"}', fix="save the file as UTF-8"
        )
    ]


REFUSED_LINES = {
    '{"text": NaN}': "not JSON: NaN is not a JSON number",
    '{"text": "a", "text": "b"}': "not JSON: key `text` stands twice",
    '{"text": "\\ud83d"}': "not JSON: half of a surrogate pair (a `\\ud800` … `\\udfff` that stands alone)",
    "[" * 100_000: "not JSON: nested too deeply",
    '["a"]': "a row is an object, not a list",
    "null": "a row is an object, not null",
    "3": "a row is an object, not a number",
}


@pytest.mark.parametrize(("line", "what"), REFUSED_LINES.items(), ids=REFUSED_LINES.values())
def test_a_line_that_only_some_readers_take_is_refused(tmp_path, line, what):
    (tmp_path / "train.jsonl").write_text(f'{{"text": "a"}}\n{line}\n')

    assert problems(tmp_path) == [Problem(what, "train.jsonl:2", quote(line), JSON_LINE)]


def test_whole_surrogate_pairs_are_characters(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n')

    assert read(tmp_path) == [(RowId("train.jsonl", 1), {"text": "😀"})]


def test_all_malformed_lines_are_found(tmp_path):
    (tmp_path / "train.jsonl").write_text('{\n{"text": "a"}\n{"text": \n')

    assert [problem.where for problem in problems(tmp_path)] == ["train.jsonl:1:2", "train.jsonl:3:10"]


BROKEN_FILES = {
    "a.json": ('[\n{"a": 1},\n{"é": }\n]', "not JSON: Expecting value", "a.json:3:7"),
    "b.json": ('{"a": 1}\n{"a": 2}', "not JSON: Extra data", "b.json:2:1"),
    "c.json": ("", "not JSON: Expecting value", "c.json:1:1"),
    "d.json": ('["a"]', "a row is an object, not text", "d.json row 1"),
    "a.csv": ("a,b\n1,2\n3\n", "1 cells where the first line names 2 columns", "a.csv:3"),
    "b.csv": ("a,a\n1,2\n", "the first line must name every column, each once", "b.csv:1"),
    "c.csv": ('a,b\n1,"2"3\n', "not CSV: ',' expected after '\"'", "c.csv:2"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_file_is_named_by_its_place(tmp_path, name):
    text, what, where = BROKEN_FILES[name]
    (tmp_path / name).write_text(text)

    [problem] = problems(tmp_path, name)

    assert (problem.what, problem.where) == (what, where)


def test_a_broken_parquet_file_is_a_data_error(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")

    [problem] = problems(tmp_path, "a.parquet")

    assert problem.what.startswith("not Parquet: ")


@pytest.mark.parametrize("count", [0, 2])
def test_a_json_object_must_hold_one_list(tmp_path, count):
    (tmp_path / "a.json").write_text(json.dumps({str(i): [{"text": "a"}] for i in range(count)}))

    [problem] = problems(tmp_path, "a.json")

    assert problem.what == ("`a.json` holds 2 lists" if count else "`a.json` holds no list of rows")


def test_a_missing_file_names_the_nearest_one(tmp_path):
    write_jsonl(tmp_path / "train.jsonl")

    assert problems(tmp_path, "trian.jsonl") == [
        Problem(
            "data file `trian.jsonl` does not exist", where=str(tmp_path / "trian.jsonl"), fix="`train.jsonl` is there"
        )
    ]


def test_a_folder_names_the_data_files_in_it(tmp_path):
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data/train.jsonl")
    (tmp_path / "data/README.md").touch()

    assert problems(tmp_path, "data/") == [
        Problem(
            "`data/` is a folder, not a data file", where=str(tmp_path / "data"), fix="name a file: `data/train.jsonl`"
        )
    ]


def test_a_file_of_another_form_names_the_forms(tmp_path):
    (tmp_path / "a.xlsx").touch()

    [problem] = problems(tmp_path, "a.xlsx")

    assert problem.fix == (
        "use a file that ends in one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .txt "
        "(and those with .gz or .zst behind it)"
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("tatsu-lab/alpaca", False),
        ("squad", False),
        ("there/rows", True),
        ("train.jsonl", True),
        ("org/train.csv", True),
        ("./squad", True),
        ("/squad", True),
        ("../squad", True),
        ("a/b/c", True),
    ],
)
def test_a_source_is_a_path_if_it_looks_like_one_or_is_there(tmp_path, source, expected):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/rows").touch()

    assert is_path(source, tmp_path) == expected


def test_a_hub_id_without_a_network_says_what_to_do(tmp_path):
    [problem] = problems(tmp_path, "nobody/nothing")

    assert problem.what.startswith("dataset `nobody/nothing` cannot be had from the hub: ")
    assert problem.fix == (
        "check the name and the network; `hf auth login` for a gated or private one; or name a local file"
    )


def test_a_quoted_line_is_short_and_inert():
    line = "a" * 500 + "\x1b[2J\u202e" + "b" * 500

    quoted = quote(line, 501)

    assert "a\\x1b[2J\\u202eb" in quoted
    assert quoted.startswith("…a")
    assert quoted.endswith("b…")
    assert len(quoted) < 100
    assert quote("short é") == "short é"
