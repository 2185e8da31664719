import pytest
import torch

from lora_cli.data.collate import blank, collate
from lora_cli.data.types import IGNORE, Example, RowId

ROW = RowId("train.jsonl", 1)
SHORT = Example([5, 6, 9], [0.0, 0.0, 1.0], ROW)
LONG = Example([5, 6, 7, 9, 8, 9], [0.0, 1.0, 0.0, 1.0, 0.5, 1.0], ROW)


def test_labels_are_the_next_tokens_of_what_is_trained():
    batch = collate([LONG], pad_id=9)

    assert batch["input_ids"].tolist() == [[5, 6, 7, 9, 8, 9]]
    assert batch["labels"].tolist() == [[6, IGNORE, 9, 8, 9, IGNORE]]
    assert batch["weights"].tolist() == [[1.0, 0.0, 1.0, 0.5, 1.0, 0.0]]


@pytest.mark.parametrize("pad_id", [0, 9], ids=["another token", "the stop token"])
def test_padding_is_neither_read_nor_trained_whatever_its_token(pad_id):
    batch = collate([SHORT, LONG], pad_id=pad_id)

    assert batch["input_ids"][0].tolist() == [5, 6, 9, pad_id, pad_id, pad_id]
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 0, 0, 0]
    assert batch["labels"][0].tolist() == [IGNORE, 9, IGNORE, IGNORE, IGNORE, IGNORE]


def test_the_weights_of_a_batch_are_those_of_its_examples():
    batch = collate([SHORT, LONG, SHORT], pad_id=0)

    assert batch["weights"].sum().item() == sum(example.items for example in (SHORT, LONG, SHORT))
    assert ((batch["weights"] > 0) == (batch["labels"] != IGNORE)).all()


def test_positions_are_those_where_any_row_has_a_label():
    assert collate([SHORT, LONG], pad_id=0)["positions"].tolist() == [0, 1, 2, 3, 4]
    assert collate([SHORT], pad_id=0)["positions"].tolist() == [1]


def test_a_batch_has_the_types_that_models_take():
    batch = collate([SHORT], pad_id=0)

    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "labels": torch.int64,
        "weights": torch.float32,
        "positions": torch.int64,
    }


def test_a_blank_example_is_read_and_has_nothing_to_learn():
    batch = collate([blank(LONG)], pad_id=0)

    assert batch["input_ids"].tolist() == [LONG.input_ids]
    assert batch["weights"].sum() == 0
    assert batch["positions"].tolist() == []
    assert blank(LONG).items == 0
