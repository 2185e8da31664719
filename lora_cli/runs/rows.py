"""The rows of a recipe as training sees them: every command that reads a recipe's rows gets them here."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.data.pipeline import DataReport, Plan, epoch_length, load_examples, plan, split
from lora_cli.data.types import Example
from lora_cli.recipe.reader import LoadedRecipe
from lora_cli.recipe.schema import Data, Recipe, share_of
from lora_cli.runs.parts import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Loaded = tuple[list[Example], DataReport]


def load_rows(loaded: LoadedRecipe, tokenizer: "PreTrainedTokenizerBase") -> Rows:
    """Training and held-out examples of a recipe: `data.eval` is a share of the training rows, or a source of its own."""
    data = loaded.recipe.data
    load = _loader(data, loaded.path.parent, tokenizer)
    examples, report = load(data.train)
    if data.eval is None:
        return Rows(examples, [], report, None)
    if (share := share_of(data.eval)) is not None:
        return Rows(*split(examples, share, loaded.recipe.training.seed), report, None)
    held_out, held_out_report = load(data.eval)
    return Rows(examples, held_out, report, held_out_report)


def rows_of_file(source: str, tokenizer: "PreTrainedTokenizerBase", data: Data | None = None) -> Loaded:
    """All rows of one source, relative to the current folder, read as `data` says (by default, as they come)."""
    return _loader(data or Data(train=source), Path(), tokenizer)(source)


def _loader(data: Data, folder: Path, tokenizer: "PreTrainedTokenizerBase") -> Callable[..., Loaded]:
    return partial(
        load_examples,
        folder=folder,
        tokenizer=tokenizer,
        max_length=data.max_length,
        format=data.format,
        columns=data.columns,
        template=data.template,
        train_on=data.train_on,
        bad_rows=data.bad_rows,
    )


def planned(recipe: Recipe, rows: Rows) -> Plan:
    """The steps that the recipe takes over its training rows."""
    training = recipe.training
    return plan(
        epoch_length(rows.train),
        epochs=training.epochs,
        max_steps=training.max_steps,
        global_batch_size=training.global_batch_size,
    )
