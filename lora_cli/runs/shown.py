"""Which examples of a recipe to show: by row, by source, or as one step of training lays them out. No weights are loaded."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_cli.data.examples import Examples
from lora_cli.data.order import steps
from lora_cli.data.pipeline import OnTokenized
from lora_cli.data.texts import token_texts
from lora_cli.data.types import Example
from lora_cli.errors import Problem, RecipeError
from lora_cli.models.base import resolve_base
from lora_cli.models.load import skeleton
from lora_cli.recipe.reader import LoadedRecipe
from lora_cli.runs.figures import step_decision
from lora_cli.runs.parts import Rows
from lora_cli.runs.rows import load_rows, new_head, planned, recipe_tokenizer
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


@dataclass(frozen=True)
class Asked:
    """What to show: `row` is a line number, or `SOURCE:N`."""

    row: str | None = None
    source: str | None = None
    held_out: bool = False


def prepare_rows(loaded: LoadedRecipe, progress: OnTokenized | None = None) -> Prepared:
    model = loaded.recipe.model
    folder = resolve_base(model.base, model.revision, weights=False).folder
    tokenizer = recipe_tokenizer(loaded.recipe, folder)
    return Prepared(loaded, tokenizer, load_rows(loaded, tokenizer, progress, pairs=True))


@dataclass(frozen=True)
class Chosen:
    """The examples that were asked for, in the order of their files."""

    trained: Examples
    held_out: Examples

    def __len__(self) -> int:
        return len(self.trained) + len(self.held_out)

    def first(self, count: int) -> Iterator[tuple[Example, bool]]:
        """(example, whether it is held out)."""
        yield from ((example, False) for example in self.trained[:count])
        yield from ((example, True) for example in self.held_out[: max(0, count - len(self.trained))])


def chosen(prepared: Prepared, asked: Asked) -> Chosen:
    """Raises RecipeError where there is nothing to choose."""
    train, held_out = Examples.of(prepared.rows.train), Examples.of(prepared.rows.held_out)
    if asked.held_out and not held_out:
        raise RecipeError(Problem("`data.eval` is null: no rows are held out", fix="leave `--held-out` out"))
    # a row is named wherever it stands
    sides = [
        found if wanted else found[:0]
        for found, wanted in ((train, not asked.held_out), (held_out, asked.held_out or asked.row))
    ]
    source, number = _row(asked)
    if source is not None:
        sides = _of_source(sides, source)
    if number is None:
        return Chosen(*sides)
    found = Chosen(*(side.take(np.flatnonzero(side.column("row") == number)) for side in sides))
    if len(found):
        return found
    last = max(int(side.column("row").max()) for side in sides if side)
    raise RecipeError(
        Problem(
            f"no example comes from row {asked.row}",
            fix=f"the last is {last}; blank lines, and rows with nothing to learn, give none",
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
    layout = step_decision(recipe, prepared.rows.all, model).layout
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


def _of_source(sides: Sequence[Examples], source: str) -> list[Examples]:
    found = [side.of_source(source) for side in sides]
    if any(found):
        return found
    names = list(
        dict.fromkeys(origin.source for side in sides for origin in side.origins if side.of_source(origin.source))
    )
    near = difflib.get_close_matches(source, names, n=1) or names
    raise RecipeError(Problem(f"no example comes from `{source}`", fix=f"there is {', '.join(near[:5])}"))
