"""Rows that are classified: from their columns to a batch, cut by the tokenizer, and every label accounted for."""

import json
import logging

import pytest
import torch
from tiny import byte_tokenizer, encoder_tokenizer

from lora_cli.data.collate import blank, collate
from lora_cli.data.examples import fingerprint
from lora_cli.data.pipeline import load_examples
from lora_cli.data.types import Example, RowId
from lora_cli.errors import DataError
from lora_cli.recipe.schema import Source

CAT, HAT = {"text": "the cat sat", "label": "animal"}, {"text": "that hat", "label": "thing"}


@pytest.fixture(scope="module")
def tokenizer():
    return encoder_tokenizer()


def load(folder, tokenizer, *rows, labels=(), sources="train.jsonl", max_length=64, **options):
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"folder": folder, "tokenizer": tokenizer, "max_length": max_length, "labels": labels}
    return load_examples(sources, **given, **options)


def refused(*given, **options) -> str:
    with pytest.raises(DataError) as error:
        load(*given, **options)
    return str(error.value)


def test_a_row_is_its_text_between_special_tokens_and_the_number_of_its_label(tmp_path, tokenizer):
    (cat, hat), report = load(tmp_path, tokenizer, CAT, HAT)

    assert tokenizer.decode(cat.input_ids) == "<s>the cat sat</s>"
    assert (cat.label, hat.label) == (0, 1)
    assert (cat.items, hat.items) == (1, 1)
    assert report.labels == {"animal": 1, "thing": 1}
    assert report.formats == {"train.jsonl": "labelled"}
    assert report.summary() == f"2 rows (labelled), 2 labels, {report.tokens} tokens"


def test_a_pair_is_read_behind_the_text_in_a_segment_of_its_own(tmp_path, tokenizer):
    (cat, hat), _ = load(tmp_path, tokenizer, CAT | {"text_pair": "on"}, HAT)

    first = len(tokenizer("the cat sat")["input_ids"])
    assert tokenizer.decode(cat.input_ids) == "<s>the cat sat</s>on</s>"
    assert cat.segments == (0,) * first + (1,) * (len(cat.input_ids) - first)
    assert hat.segments is None


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["b", "a", "B"], ["B", "a", "b"]),
        ([10, 9, -1], ["-1", "9", "10"]),
        (["10", 9, "x"], ["10", "9", "x"]),
    ],
)
def test_labels_are_sorted_as_numbers_where_all_are(labels, expected, tmp_path, tokenizer):
    _, report = load(tmp_path, tokenizer, *(CAT | {"label": label} for label in labels))

    assert list(report.labels) == expected


def test_labels_that_are_given_keep_their_order(tmp_path, tokenizer):
    (cat, hat), report = load(tmp_path, tokenizer, CAT, HAT, labels=("thing", "place", "animal"))

    assert (cat.label, hat.label) == (2, 0)
    assert report.labels == {"thing": 1, "place": 0, "animal": 1}


def test_a_label_that_is_not_learned_names_its_row(tmp_path, tokenizer):
    found = refused(tmp_path, tokenizer, CAT, HAT, HAT, labels=("animal", "place"), bad_rows="error")

    assert found == (
        "error: 2 of 3 rows cannot be used:\n"
        "  train.jsonl:2: `thing` is none of the labels that are learned: `animal`, `place`\n"
        "  train.jsonl:3: `thing` is none of the labels that are learned: `animal`, `place`\n"
        "  fix: train on rows with it, or take the row out"
    )


@pytest.mark.parametrize("pair", [None, "what is the question"])
def test_the_tokenizer_cuts_and_its_special_tokens_stay(pair, tmp_path, tokenizer):
    long = {"text": "the cat sat on the mat and that is what", "text_pair": pair, "label": "animal"}
    (whole, _), _ = load(tmp_path, tokenizer, long, HAT)

    (cut, _), report = load(tmp_path, tokenizer, long, HAT, max_length=9)

    special = {1, 2}
    assert len(cut.input_ids) == 9
    assert cut.cut == len(whole.input_ids) - 9
    assert [id for id in cut.input_ids if id in special] == [id for id in whole.input_ids if id in special]
    assert cut.input_ids[-1] == 2
    assert (report.cut_rows, report.cut_tokens) == (1, cut.cut)
    assert report.lengths.longest == len(whole.input_ids)


def test_a_max_length_without_room_for_text_is_refused(tmp_path, tokenizer):
    assert refused(tmp_path, tokenizer, CAT, HAT, max_length=2) == (
        "error: `data.max_length: 2` leaves no room beside the tokenizer's 2 special tokens\n"
        "  fix: raise `data.max_length`"
    )


def test_a_row_without_text_is_left_out_and_counted(tmp_path, tokenizer, caplog):
    rows = [CAT, HAT] * 10

    examples, report = load(tmp_path, tokenizer, *rows, CAT | {"text": " "})

    assert len(examples) == 20
    assert report.dropped == {"empty text": 1}
    assert "1 of 21 rows have an empty text and are left out" in caplog.text


def test_columns_may_have_other_names(tmp_path, tokenizer):
    named = {"text": "sentence", "label": "intent"}

    examples, _ = load(
        tmp_path, tokenizer, {"sentence": "a", "intent": 0}, {"sentence": "b", "intent": 1}, columns=named
    )

    assert [example.label for example in examples] == [0, 1]


def test_a_column_that_no_row_has_is_told_once(tmp_path, tokenizer):
    assert refused(tmp_path, tokenizer, *[{"sentence": "a", "label": 0}] * 3) == (
        "error: `training.objective: classify` reads `text`, which no row has\n"
        "  --> train.jsonl\n"
        "  fix: name the column with `data.columns: {text: …}`; the rows have `sentence`, `label`"
    )


def test_a_label_that_is_not_read_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO)

    _, report = load(tmp_path, byte_tokenizer(), CAT, HAT, labels=None)

    assert report.formats == {"train.jsonl": "text"}
    assert "train.jsonl: the column `label` is not read; `training.objective: classify` would learn it" in caplog.text


def test_another_label_or_another_segment_is_another_fingerprint(tmp_path, tokenizer):
    example = Example([5, 6], [0.0, 1.0], RowId("a", 1), label=0)

    found = [
        fingerprint([Example(example.input_ids, example.weights, example.row, label=label, segments=segments)])
        for label, segments in ((0, None), (1, None), (0, (0, 1)), (None, None))
    ]

    assert len(set(found)) == 4


def test_sources_may_be_mixed(tmp_path, tokenizer):
    sources = [Source(source="train.jsonl", weight=2.0), Source(source="more.jsonl", format="labelled")]
    (tmp_path / "more.jsonl").write_text(json.dumps(CAT | {"label": "other"}) + "\n")

    examples, report = load(tmp_path, tokenizer, CAT, HAT, sources=sources)

    assert report.labels == {"animal": 1, "other": 1, "thing": 1}
    assert [example.repeats for example in examples] == [2.0, 2.0, 1.0]


SHORT = Example([1, 0, 2], [0.0, 0.0, 1.0], RowId("a", 1), label=2)
LONG = Example([1, 5, 2, 6, 2], [0.0, 0.0, 0.0, 0.0, 1.0], RowId("a", 2), label=0, segments=(0, 0, 0, 1, 1))


def test_a_batch_tells_labels_weights_and_what_is_padding():
    batch = collate([[SHORT], [LONG]])

    assert batch["input_ids"].tolist() == [[1, 0, 2, 0, 0], [1, 5, 2, 6, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]
    assert batch["labels"].tolist() == [2, 0]
    assert batch["weights"].tolist() == [1.0, 1.0]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64, torch.float32}


def test_a_batch_without_pairs_has_no_segments():
    assert "token_type_ids" not in collate([[SHORT], [SHORT]])


def test_a_blank_row_keeps_its_label_and_weighs_nothing():
    batch = collate([[blank(LONG)]])

    assert (batch["labels"].tolist(), batch["weights"].tolist()) == ([0], [0.0])
