import torch

from lora_cli.data.collate import blank, collate, joined
from lora_cli.data.types import IGNORE, Example, RowId

ROW = RowId("train.jsonl", 1)
SHORT = Example([5, 6, 9], [0.0, 0.0, 1.0], ROW)
LONG = Example([5, 6, 7, 9, 8, 9], [0.0, 1.0, 0.0, 1.0, 0.5, 1.0], ROW)


def test_labels_are_the_next_tokens_of_what_is_trained():
    batch = collate([[LONG]])

    assert batch["input_ids"].tolist() == [[5, 6, 7, 9, 8, 9]]
    assert batch["labels"].tolist() == [[6, IGNORE, 9, 8, 9, IGNORE]]
    assert batch["weights"].tolist() == [[1.0, 0.0, 1.0, 0.5, 1.0, 0.0]]


def test_padding_is_not_trained_even_where_a_row_holds_the_same_token():
    zeros = Example([0, 0, 0], [0.0, 0.0, 1.0], ROW)

    batch = collate([[zeros], [LONG]])

    assert batch["input_ids"][0].tolist() == [0] * 6
    assert batch["labels"][0].tolist() == [IGNORE, 0, IGNORE, IGNORE, IGNORE, IGNORE]


def test_the_weights_of_a_batch_are_those_of_its_examples():
    batch = collate([[SHORT], [LONG], [SHORT]])

    assert batch["weights"].sum().item() == sum(example.items for example in (SHORT, LONG, SHORT))
    assert ((batch["weights"] > 0) == (batch["labels"] != IGNORE)).all()


def test_positions_are_those_where_any_row_has_a_label():
    assert collate([[SHORT], [LONG]])["positions"].tolist() == [0, 1, 2, 3, 4]
    assert collate([[SHORT]])["positions"].tolist() == [1]


def test_a_batch_has_the_types_that_models_take():
    batch = collate([[SHORT]])

    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "input_ids": torch.int64,
        "labels": torch.int64,
        "weights": torch.float32,
        "positions": torch.int64,
    }


def test_a_blank_example_is_read_and_has_nothing_to_learn():
    batch = collate([[blank(LONG)]])

    assert batch["input_ids"].tolist() == [LONG.input_ids]
    assert batch["weights"].sum() == 0
    assert batch["positions"].tolist() == []
    assert blank(LONG).items == 0


def test_a_packed_row_tells_its_documents_and_restarts_their_places():
    batch = collate([[SHORT, LONG], [LONG]])

    assert batch["input_ids"].tolist() == [[5, 6, 9, 5, 6, 7, 9, 8, 9], [5, 6, 7, 9, 8, 9, 0, 0, 0]]
    assert batch["documents"].tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1, 1]]
    assert batch["places"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 0, 1, 2]]


def test_no_document_is_predicted_from_the_one_before_it():
    batch = collate([[SHORT, LONG]])

    assert batch["labels"].tolist() == [[IGNORE, 9, IGNORE, 6, IGNORE, 9, 8, 9, IGNORE]]
    assert batch["weights"].sum().item() == SHORT.items + LONG.items


def test_batches_are_joined_row_below_row_and_stay_apart_by_source():
    packed, plain = collate([[SHORT, LONG]]), collate([[LONG], [SHORT]], ["train.jsonl", "other.jsonl"])

    both = joined([packed, plain])

    assert both["input_ids"].shape == (3, 9)
    assert both["input_ids"][1].tolist() == [*LONG.input_ids, 0, 0, 0]
    assert both["labels"][1].tolist() == [*plain["labels"][0].tolist(), IGNORE, IGNORE, IGNORE]
    assert both["sources"].shape == (3, 3, 9)
    assert both["sources"].any(dim=2).tolist() == [[True, False, False], [False, True, True], [False, False, False]]
    assert both["weights"].sum() == packed["weights"].sum() + plain["weights"].sum()
    assert both["documents"][1].tolist() == [0] * 6 + [6] * 3  # the padding is a document of its own
    assert both["places"][1].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
