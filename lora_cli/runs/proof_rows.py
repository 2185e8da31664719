"""The rows on which a merge proves itself: those of the run that trained the adapter."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.errors import UserError
from lora_cli.recipe.reader import read_recipe
from lora_cli.runs.folder import RunFolder
from lora_cli.runs.train import load_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def rows_for_proof(adapter_folder: Path, tokenizer: "PreTrainedTokenizerBase") -> Sequence[list[int]] | None:
    """Tokens of the run's held-out rows, else of its training rows; None where the folder is no run or its data is gone."""
    recipe = RunFolder(adapter_folder).recipe
    if not recipe.is_file():
        return None
    try:
        rows = load_rows(read_recipe(recipe), tokenizer)
    except UserError as error:
        log.info("the run's own rows can't be read again (%s): other text is used", error.problems[0].what)
        return None
    return [example.input_ids for example in (rows.held_out or rows.train)]
