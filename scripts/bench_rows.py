"""Rows to measure with: real text cut to chosen lengths, of which the last two thirds are trained, as answers are."""

import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.data.types import Example, RowId

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENTRIES = Path(__file__).resolve().parent.parent / "recipes/jargon/jargon.jsonl"
PROMPT = 1 / 3  # of a row, which is read and not trained


def even_lengths(count: int, tokens: int) -> list[int]:
    return [tokens] * count


def mixed_lengths(count: int, least: int, most: int, seed: int = 0) -> list[int]:
    """As chat data has them: the logarithms are spread evenly, so most rows are short and few are long."""
    draw = random.Random(seed)
    return [round(least * (most / least) ** draw.random()) for _ in range(count)]


def rows_of(lengths: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
    """Entries of the Jargon File, one behind the other, cut to rows of these lengths."""
    tokens, place, rows = _tokens(tokenizer), 0, []
    for number, length in enumerate(lengths):
        ids = [tokens[(place + i) % len(tokens)] for i in range(length)]
        prompt = max(1, round(PROMPT * length))
        rows.append(Example(ids, [0.0] * prompt + [1.0] * (length - prompt), RowId("jargon", number)))
        place += length
    return rows


def random_rows(lengths: Sequence[int], vocabulary: int) -> list[Example]:
    """For models with random weights: what is read there does not matter."""
    draw = random.Random(0)
    return [
        Example([draw.randrange(vocabulary) for _ in range(length)], [0.0] + [1.0] * (length - 1), RowId("random", i))
        for i, length in enumerate(lengths)
    ]


@cache
def _tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    entries = [json.loads(line) for line in ENTRIES.read_text(encoding="utf-8").splitlines()]
    texts = [f"{entry['input']}: {entry['output']}" for entry in entries]
    return [token for ids in tokenizer(texts)["input_ids"] for token in ids]
