"""Tokenized rows are made once, by one process, whole or not at all."""

import json
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from templates import CHATML, LLAMA3, tiny_tokenizer

from lora_cli.data import cache
from lora_cli.data.cache import REPORT, kept, rows_cache
from lora_cli.data.pipeline import load_examples
from lora_cli.data.render import Renderer
from lora_cli.errors import DataError, StorageError

PAIR = {"prompt": "what", "completion": " the cat"}


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def rendered(monkeypatch):
    """The rows that are rendered, as they are."""
    found, render = [], Renderer.render
    monkeypatch.setattr(Renderer, "render", lambda self, item, row: found.append(row) or render(self, item, row))
    return found


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(CHATML)


def write(folder, *rows, name="train.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def load(folder, tokenizer, **options):
    options = {"max_length": 64} | options
    return load_examples("train.jsonl", folder=folder, tokenizer=tokenizer, **options)


def content(folder):
    return (folder / REPORT).read_text()


def entries():
    return [path for path in rows_cache().iterdir() if path.is_dir()]


def test_the_same_rows_are_tokenized_once_with_the_same_report_and_the_same_notices(
    tmp_path, tokenizer, rendered, caplog
):
    write(tmp_path, *[PAIR] * 38, {**PAIR, "completion": ""}, {"prompt": "what", "completion": " the cat" * 40})
    with caplog.at_level(logging.INFO, "lora_cli"):
        first, report = load(tmp_path, tokenizer)
    told, count = list(caplog.messages), len(rendered)
    caplog.clear()

    with caplog.at_level(logging.INFO, "lora_cli"):
        again, report_again = load(tmp_path, tokenizer)

    assert (count, len(rendered)) == (39, 39)
    assert again == first
    assert report_again == report
    assert caplog.messages == told
    assert len(told) == 2
    assert report.dropped == {"empty answer": 1}


CHANGES = {
    "max_length": {"max_length": 63},
    "train_on": {"train_on": "all"},
    "bad_rows": {"bad_rows": "skip"},
    "format": {"format": "completion"},
    "columns": {"columns": {"prompt": "prompt"}},
    "template": {"template": "{prompt} [[{completion}]]"},
}


@pytest.mark.parametrize("options", CHANGES.values(), ids=CHANGES)
def test_another_recipe_is_another_entry(options, tmp_path, tokenizer, rendered):
    write(tmp_path, PAIR)
    load(tmp_path, tokenizer)

    load(tmp_path, tokenizer, **options)

    assert len(rendered) == 2


def test_other_bytes_another_template_or_another_token_are_another_entry(tmp_path, tokenizer, rendered):
    write(tmp_path, PAIR)
    load(tmp_path, tokenizer)
    other = tiny_tokenizer(CHATML)
    load(tmp_path, other)
    assert len(rendered) == 1

    load(tmp_path, tiny_tokenizer(LLAMA3))
    other.add_tokens(["cat"])
    load(tmp_path, other)
    other.eos_token = "</s>"
    load(tmp_path, other)
    write(tmp_path, {**PAIR, "completion": " the mat"})
    load(tmp_path, tokenizer)

    assert len(rendered) == 5


def test_a_dataset_of_the_hub_is_known_by_its_tables(tmp_path, tokenizer, rendered, monkeypatch):
    datasets = pytest.importorskip("datasets")
    held = {"rows": [PAIR] * 3}
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: datasets.Dataset.from_list(held["rows"]))
    options = {"folder": tmp_path, "tokenizer": tokenizer, "max_length": 64}

    examples, _ = load_examples("some/rows", **options)
    again, _ = load_examples("some/rows", **options)
    held["rows"] = [PAIR] * 4
    more, _ = load_examples("some/rows", **options)

    assert [str(example.row) for example in examples] == [f"some/rows row {number}" for number in (1, 2, 3)]
    assert again == examples
    assert len(more) == 4
    assert len(rendered) == 3 + 4


def test_a_file_elsewhere_with_the_same_bytes_is_the_same_entry(tmp_path, tokenizer, rendered):
    write(tmp_path, PAIR)
    load(tmp_path, tokenizer)
    (tmp_path / "moved").mkdir()
    shutil.copy(tmp_path / "train.jsonl", tmp_path / "moved")

    load(tmp_path / "moved", tokenizer)

    assert len(rendered) == 1


DAMAGES = {
    "a byte": lambda folder: (folder / "tokens").write_bytes(b"\xff" + (folder / "tokens").read_bytes()[1:]),
    "its end": lambda folder: os.truncate(folder / "records", 3),
    "a file": lambda folder: (folder / "runs").unlink(),
    "the report": lambda folder: (folder / REPORT).unlink(),
    "half a report": lambda folder: os.truncate(folder / REPORT, 100),
    "a key": lambda folder: (folder / REPORT).write_text("{}"),
    "everything": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_made_anew(damage, tmp_path, tokenizer, rendered):
    write(tmp_path, PAIR)
    expected, report = load(tmp_path, tokenizer)
    [folder] = entries()
    kept_tokens = list(expected)
    damage(folder)

    assert load(tmp_path, tokenizer) == (kept_tokens, report)
    assert len(rendered) == 2
    assert load(tmp_path, tokenizer)[1] == report
    assert len(rendered) == 2


def test_an_error_leaves_nothing_and_is_told_again(tmp_path, tokenizer):
    write(tmp_path, {"prompt": "what"})

    for _ in range(2):
        with pytest.raises(DataError, match="`completion` is missing"):
            load(tmp_path, tokenizer, format="completion")

    assert not entries()


def test_what_a_killed_process_left_is_cleared_away():
    left = rows_cache() / ".tmp-key-1234"
    left.mkdir(parents=True)

    kept("key", make_of(1), content)

    assert not left.exists()


def test_a_file_that_is_written_to_meanwhile_is_an_error(tmp_path, tokenizer):
    write(tmp_path, PAIR)

    with pytest.raises(DataError, match="was changed while it was read"):
        load(tmp_path, tokenizer, progress=lambda at: write(tmp_path, PAIR, PAIR))

    assert not entries()


def test_of_processes_that_need_the_same_one_makes_it_and_the_others_wait():
    made, together = [], Barrier(4)

    def make(folder):
        made.append(folder)
        (folder / REPORT).write_text("made")

    def get(_):
        together.wait()
        return kept("key", make, content)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(get, range(4))) == ["made"] * 4
    assert len(made) == 1


def make_of(size):
    def make(folder):
        (folder / REPORT).write_bytes(b"x" * size)

    return make


def test_what_was_not_used_for_the_longest_time_goes(monkeypatch):
    monkeypatch.setattr(cache, "MOST_BYTES", 250)
    for age, key in ((30, "old"), (40, "older, but used"), (20, "newer")):
        kept(key, make_of(100), content)
        os.utime(rows_cache() / key / REPORT, (age, 1e9 - age))
        if key == "older, but used":
            kept(key, make_of(100), content)
    abandoned = rows_cache() / ".tmp-abandoned"
    abandoned.mkdir()
    os.utime(abandoned, (0, 0))

    kept("newest", make_of(100), content)

    assert {folder.name for folder in entries()} == {"older, but used", "newest"}


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, tokenizer, monkeypatch, caplog):
    write(tmp_path, PAIR)
    expected, report = load(tmp_path, tokenizer)
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))

    with caplog.at_level(logging.INFO, "lora_cli"):
        found = load(tmp_path, tokenizer)

    assert found == (expected, report)
    assert "cannot be written (Not a directory), so the tokenized rows are not kept" in caplog.messages[0]


def test_a_full_disk_is_an_error_that_names_the_way_out(tmp_path):
    def make(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left on device") as error:
        kept("key", make, content)

    assert "XDG_CACHE_HOME" in str(error.value)
    assert not entries()
