import json

import pytest

from lora_cli.errors import ModelError
from lora_cli.runs.proof_rows import FILE, rows_for_proof, write_proof_rows


def test_rows_come_back_as_they_were_kept(tmp_path):
    rows = [[1, 2, 3], [], [151_643, 0]]

    write_proof_rows(tmp_path, rows)

    assert rows_for_proof(tmp_path) == [[1, 2, 3], [151_643, 0]]
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


def test_a_few_rows_are_kept_and_the_beginning_of_each(tmp_path):
    rows = [[1_000_000 + i] * 2000 for i in range(1000)]

    write_proof_rows(tmp_path, rows)

    assert rows_for_proof(tmp_path) == [row[:512] for row in rows[:16]]


def test_a_folder_without_them_has_none(tmp_path):
    assert rows_for_proof(tmp_path) is None


DAMAGED = {
    "no JSON": "[[1, 2",
    "not UTF-8": b"\xff\xfe",
    "no list": '{"rows": []}',
    "no rows": "[1, 2]",
    "an empty row": "[[]]",
    "texts": '[["a"]]',
    "fractions": "[[1.0]]",
    "truths": "[[true]]",
    "below zero": "[[-1]]",
    "too many rows": json.dumps([[1]] * 17),
    "too long a row": json.dumps([[1] * 513]),
    "too large": "[[1]]" + " " * 200_000,
    "too deep": "[" * 100_000,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_told_with_the_way_out(tmp_path, content):
    (tmp_path / FILE).write_bytes(content if isinstance(content, bytes) else content.encode())

    with pytest.raises(ModelError) as error:
        rows_for_proof(tmp_path)

    assert str(error.value) == (
        "error: it is damaged: not a list of up to 16 rows of up to 512 token ids\n"
        f"  --> {tmp_path / FILE}\n"
        "  fix: delete it, or give rows of your own with `--data`"
    )
