"""How the rows of a step are dealt to processes and cut into micro-batches."""

import random

import pytest
import torch

from lora_cli.data.types import IGNORE, Example, RowId
from lora_cli.train.layout import Layout, filled, micro_batches

SPLITS = [(rows, processes, size) for rows in (1, 2, 7, 8, 16) for processes in (1, 2, 3, 4) for size in (1, 2, 3, 8)]


def examples(count: int) -> list[Example]:
    """Rows that differ, of many lengths, each with a prompt and some weights."""
    draw = random.Random(count)
    return [
        Example(
            [100 + i] * length, [0.0] + [draw.choice([0.0, 0.5, 1.0]) for _ in range(length - 2)] + [1.0], RowId("a", i)
        )
        for i, length in enumerate(draw.randint(2, 30) for _ in range(count))
    ]


def split(rows, processes, size):
    """The micro-batches of every rank."""
    return [micro_batches(rows, Layout(size), rank=rank, processes=processes) for rank in range(processes)]


@pytest.mark.parametrize(("count", "processes", "size"), SPLITS)
def test_any_split_trains_every_row_once(count, processes, size):
    rows = examples(count)

    trained = []
    for batches in split(rows, processes, size):
        for _, batch in batches:
            for ids, labels, weights in zip(batch["input_ids"], batch["labels"], batch["weights"], strict=True):
                if weights.any():
                    trained.append((ids.max().item(), (labels != IGNORE).sum().item(), weights.sum().item()))

    expected = [(row.input_ids[0], sum(w > 0 for w in row.weights), sum(row.weights)) for row in rows]
    assert sorted(trained) == sorted(expected)


@pytest.mark.parametrize(("count", "processes", "size"), SPLITS)
def test_every_rank_gets_the_same_number_of_batches_and_none_is_too_large(count, processes, size):
    ranks = split(examples(count), processes, size)

    assert len({len(batches) for batches in ranks}) == 1
    assert all(1 <= len(batch["input_ids"]) <= size for batches in ranks for _, batch in batches)


@pytest.mark.parametrize(("count", "processes", "size"), SPLITS)
def test_the_sum_of_the_weights_is_kept(count, processes, size):
    rows = examples(count)

    total = sum(batch["weights"].double().sum() for batches in split(rows, processes, size) for _, batch in batches)

    assert total.item() == sum(row.items for row in rows)


def test_rows_of_like_length_share_a_batch():
    rows = examples(16)

    (batches,) = split(rows, 1, 4)

    longest = [batch["input_ids"].shape[1] for _, batch in batches]
    assert longest == sorted(longest)
    assert sum(batch["input_ids"].numel() for _, batch in batches) < 16 * max(len(row.input_ids) for row in rows)


def test_a_batch_is_named_by_the_place_of_its_first_row_so_that_its_dropout_does_not_depend_on_the_rank():
    rows = examples(8)

    alone = {first for first, _ in split(rows, 1, 1)[0]}
    shared = {first for batches in split(rows, 4, 1) for first, _ in batches}

    assert alone == shared == set(range(8))


def test_a_rank_without_rows_repeats_one_with_nothing_to_learn():
    first, second = split(examples(1), 2, 4)

    assert first[0][1]["weights"].any()
    assert not second[0][1]["weights"].any()
    assert second[0][1]["positions"].numel() == 0
    assert torch.equal(first[0][1]["input_ids"], second[0][1]["input_ids"])


PACKED = [(rows, processes, length) for rows in (1, 2, 7, 16) for processes in (1, 2, 4) for length in (30, 64, 1000)]


@pytest.mark.parametrize(("count", "processes", "length"), PACKED)
def test_packing_trains_every_row_once_in_rows_that_fit_on_ranks_in_step(count, processes, length):
    rows = examples(count)
    ranks = [micro_batches(rows, Layout(2, length), rank=rank, processes=processes) for rank in range(processes)]

    weights = sum(batch["weights"].double().sum().item() for batches in ranks for _, batch in batches)
    assert weights == pytest.approx(sum(row.items for row in rows))
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batch["input_ids"].shape[1] <= length for batches in ranks for _, batch in batches)


def test_packing_wastes_less_than_padding():
    rows = examples(64)

    assert filled(rows, Layout(1, 256)) > filled(rows, Layout(16))
    assert filled(rows, Layout(1, 256)) == 1.0
