"""Which examples of a recipe to show: by row, by source, or as one step of training lays them out. No weights are loaded."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_cli.data.pipeline import steps
from lora_cli.data.texts import token_texts
from lora_cli.data.types import Example
from lora_cli.errors import Problem, RecipeError
from lora_cli.models.base import resolve_base
from lora_cli.models.load import load_tokenizer, skeleton
from lora_cli.recipe.reader import LoadedRecipe
from lora_cli.recipe.schema import labels_of
from lora_cli.runs.figures import step_decision
from lora_cli.runs.parts import Rows
from lora_cli.runs.rows import load_rows, new_head, planned
from lora_cli.train.layout import forward_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """A recipe's rows as training has them, and what is needed to show them."""

    loaded: LoadedRecipe
    tokenizer: "PreTrainedTokenizerBase"
    rows: Rows

    def texts(self, example: Example) -> list[str]:
        return token_texts(self.tokenizer, example.input_ids)

    def label(self, example: Example) -> str | None:
        """What the row is to be classified as, where rows are."""
        return None if example.label is None else self.rows.labels[example.label]

    def is_held_out(self, example: Example) -> bool:
        return any(example is other for other in self.rows.held_out)


@dataclass(frozen=True)
class Asked:
    """What to show: `row` is a line number, or `SOURCE:N`."""

    row: str | None = None
    source: str | None = None
    held_out: bool = False


def prepare_rows(loaded: LoadedRecipe) -> Prepared:
    model = loaded.recipe.model
    folder = resolve_base(model.base, model.revision, weights=False).folder
    tokenizer = load_tokenizer(folder, writes=labels_of(loaded.recipe.training) is None)
    return Prepared(loaded, tokenizer, load_rows(loaded, tokenizer))


def chosen(prepared: Prepared, asked: Asked) -> list[Example]:
    """The examples asked for, in the order of their files. Raises RecipeError where there is none."""
    rows = prepared.rows
    if asked.held_out and not rows.held_out:
        raise RecipeError(Problem("`data.eval` is null: no rows are held out", fix="leave `--held-out` out"))
    of_row = [*rows.train, *rows.held_out] if asked.row else rows.train  # a row is named wherever it stands
    found = rows.held_out if asked.held_out else of_row
    source, number = _row(asked)
    if source is not None:
        found = _of_source(found, source)
    if number is None:
        return found
    if matching := [example for example in found if example.row.number == number]:
        return matching
    raise RecipeError(
        Problem(
            f"no example comes from row {asked.row}",
            fix=f"the last is {max(example.row.number for example in found)}; blank lines, and rows with nothing to learn, "
            "give none",
        )
    )


def packed_step(prepared: Prepared, step: int) -> list[list[Example]]:
    """The rows of one step's forwards, counted from 1, on one device of this machine."""
    recipe, train = prepared.loaded.recipe, prepared.rows.train
    plan = planned(recipe, prepared.rows)
    if not 1 <= step <= plan.steps:
        raise RecipeError(Problem(f"there is no step {step}", fix=f"the steps are 1 to {plan.steps:,}"))
    base = resolve_base(recipe.model.base, recipe.model.revision, weights=False)
    model = skeleton(base.folder, new_head(recipe.training, prepared.rows.labels))
    layout = step_decision(recipe, [*train, *prepared.rows.held_out], model).layout
    _, taken = next(steps(train, plan, seed=recipe.training.seed, start=step - 1))
    return forward_rows(taken, layout)


def _row(asked: Asked) -> tuple[str | None, int | None]:
    """(source, number) of `17` or `SOURCE:17`."""
    if asked.row is None:
        return asked.source, None
    source, _, number = asked.row.rpartition(":")
    if not (number.isascii() and number.isdigit()) or (source and asked.source):
        raise RecipeError(Problem(f"`--row {asked.row}` is no row", fix="give a number from 1, or `SOURCE:NUMBER`"))
    return source or asked.source, int(number)


def _of_source(examples: Sequence[Example], source: str) -> list[Example]:
    found = [example for example in examples if example.row.source == source]
    if found:
        return found
    names = list(dict.fromkeys(example.row.source for example in examples))
    near = difflib.get_close_matches(source, names, n=1) or names
    raise RecipeError(Problem(f"no example comes from `{source}`", fix=f"there is {', '.join(near[:5])}"))
