"""The rows on which a merge proves itself: some of those of the run that trained the adapter, kept in its folder."""

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from lora_cli.errors import ModelError, Problem
from lora_cli.export.proof import MOST_ROWS, MOST_TOKENS
from lora_cli.runs.folder import write_json

FILE = "proof_rows.json"
MOST_BYTES = MOST_ROWS * MOST_TOKENS * 24  # a number, its comma, its line and its indent


def write_proof_rows(folder: Path, rows: Iterable[list[int]]) -> None:
    """Keep the first rows with any token, and of each the tokens that a proof reads."""
    write_json(folder / FILE, list(islice((row[:MOST_TOKENS] for row in rows if row), MOST_ROWS)))


def rows_for_proof(adapter_folder: Path) -> list[list[int]] | None:
    """Rows of token ids; None where the folder keeps none. Raises ModelError for a file that a run can't have written."""
    file = adapter_folder / FILE
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text()) if file.stat().st_size <= MOST_BYTES else None
    except (ValueError, RecursionError):
        found = None
    if not (_is_list(found, most=MOST_ROWS) and all(_is_row(row) for row in found)):
        raise ModelError(
            Problem(
                f"it is damaged: not a list of up to {MOST_ROWS} rows of up to {MOST_TOKENS} token ids",
                where=str(file),
                fix="delete it, or give rows of your own with `--data`",
            )
        )
    return found


def _is_row(row: object) -> bool:
    return _is_list(row, most=MOST_TOKENS) and row != [] and all(type(token) is int and token >= 0 for token in row)


def _is_list(value: object, most: int) -> bool:
    return isinstance(value, list) and len(value) <= most
