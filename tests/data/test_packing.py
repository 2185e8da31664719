import random

import pytest

from lora_cli.data.packing import deal, first_fit_decreasing

DRAWS = [[random.Random(seed).randint(1, 100) for _ in range(size)] for seed, size in enumerate((1, 2, 10, 100))]


@pytest.mark.parametrize("lengths", DRAWS, ids=len)
def test_every_place_lies_in_one_row_and_no_row_overflows(lengths):
    rows = first_fit_decreasing(lengths, 100)

    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    assert all(sum(lengths[place] for place in row) <= 100 for row in rows)


@pytest.mark.parametrize("lengths", DRAWS, ids=len)
def test_the_rows_are_few(lengths):
    fewest = -(-sum(lengths) // 100)

    assert len(first_fit_decreasing(lengths, 100)) <= 11 / 9 * max(fewest, sum(length > 50 for length in lengths)) + 1


def test_what_is_longer_than_a_row_gets_one_of_its_own():
    assert first_fit_decreasing([5, 300, 5], 100) == [[1], [0, 2]]


@pytest.mark.parametrize("hands", [1, 2, 7])
@pytest.mark.parametrize("lengths", DRAWS, ids=len)
def test_hands_are_dealt_every_place_once_and_nearly_equal_sums(lengths, hands):
    dealt = deal(lengths, hands)

    sums = [sum(lengths[place] for place in hand) for hand in dealt]
    assert sorted(place for hand in dealt for place in hand) == list(range(len(lengths)))
    assert max(sums) - min(sums) <= max(lengths)
