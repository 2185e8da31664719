import random

from lora_cli.data.duplicates import exact_duplicates, near_duplicates
from lora_cli.data.types import Example, RowId


def example(ids, cut=0):
    return Example(list(ids), [1.0] * len(ids), RowId("a.jsonl", 1), cut)


def random_rows(count, length=60, seed=0):
    generator = random.Random(seed)
    return [[generator.randrange(1000) for _ in range(length)] for _ in range(count)]


def test_equal_tokens_are_exact_duplicates_of_the_first():
    a, b = random_rows(2)

    assert exact_duplicates([example(ids) for ids in (a, b, a, a)]) == [(2, 0), (3, 0)]


def test_rows_that_differ_beyond_max_length_are_no_duplicates():
    assert exact_duplicates([example([1, 2], cut=3), example([1, 2], cut=4)]) == []


def test_a_row_with_one_changed_token_is_a_near_duplicate_and_others_are_not():
    rows = random_rows(50, length=200)
    changed = [*rows[7][:100], 5000, *rows[7][101:]]

    assert near_duplicates([example(ids) for ids in [*rows, changed]]) == [(50, 7)]


def test_what_many_rows_share_makes_no_near_duplicates():
    [template] = random_rows(1, length=300, seed=1)

    assert near_duplicates([example(template + ids) for ids in random_rows(50, length=20)]) == []


def test_an_exact_duplicate_is_not_a_near_one_too():
    rows = random_rows(5)

    assert near_duplicates([example(ids) for ids in [*rows, rows[0]]]) == []


def test_short_and_single_rows_are_looked_at_too():
    assert near_duplicates([example([1, 2]), example([1])]) == []
    assert near_duplicates([]) == []
