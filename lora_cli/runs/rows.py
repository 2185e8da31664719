"""The rows of a recipe as training sees them: every command that reads a recipe's rows gets them here."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_cli.data.examples import Examples
from lora_cli.data.formats import PREFERENCE
from lora_cli.data.order import Plan, epoch_length, plan, split
from lora_cli.data.pipeline import OnTokenized, load_examples
from lora_cli.data.report import DataReport
from lora_cli.data.sources import quote
from lora_cli.errors import DataError, Problem
from lora_cli.models.heads import Head
from lora_cli.models.load import load_tokenizer
from lora_cli.models.tokens import add_tokens
from lora_cli.recipe.reader import LoadedRecipe
from lora_cli.recipe.schema import NO_LABELS, Data, Recipe, Training, labels_of, share_of
from lora_cli.runs.parts import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Loaded = tuple[Examples, DataReport]
NAMED = 5  # rows that a message names


def recipe_tokenizer(recipe: Recipe, base: Path) -> "PreTrainedTokenizerBase":
    """The base's tokenizer with the recipe's new tokens."""
    tokenizer = load_tokenizer(base, writes=labels_of(recipe.training) is None)
    add_tokens(tokenizer, recipe.lora.new_tokens)
    return tokenizer


def load_rows(
    loaded: LoadedRecipe,
    tokenizer: "PreTrainedTokenizerBase",
    progress: OnTokenized | None = None,
    *,
    pairs: bool = False,
) -> Rows:
    """Training and held-out examples of a recipe: `data.eval` is a share of the training rows, or a source of its own.

    Raises DataError for preferences, which no objective learns, unless they are only to be looked at (`pairs`).
    """
    data, labels = loaded.recipe.data, labels_of(loaded.recipe.training)
    load = _loader(data, loaded.path.parent, tokenizer, progress)
    examples, report = load(data.train, labels=labels)
    if data.eval is None:
        rows = Rows(examples, [], report, None)
    elif (share := share_of(data.eval)) is not None:
        rows = Rows(*split(examples, share, loaded.recipe.training.seed), report, None)
    else:
        held_out, held_out_report = load(data.eval, labels=None if labels is None else tuple(report.labels))
        rows = Rows(examples, held_out, report, held_out_report)
    if labels is not None:
        _check_labels(rows)
    if not pairs:
        refuse_pairs(report)
    return rows


def rows_of_file(
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    data: Data | None = None,
    labels: tuple[str, ...] | None = None,
    progress: OnTokenized | None = None,
) -> Loaded:
    """All rows of one source, relative to the current folder, read as `data` says (by default, as they come), and
    classified where there are labels."""
    found = _loader(data or Data(train=source), Path(), tokenizer, progress)(source, labels=labels)
    refuse_pairs(found[1])
    return found


def refuse_pairs(report: DataReport) -> None:
    """DataError where a source holds preferences: to learn both sides alike would teach what was rejected."""
    if of_pairs := [source for source, format in report.formats.items() if format == PREFERENCE]:
        raise DataError(
            Problem(
                "the rows are preferences (`chosen` and `rejected`), and no objective learns from them yet",
                where=", ".join(of_pairs),
                fix="to learn the chosen answers alone, set `data.format: completion` and `data.columns: "
                "{completion: chosen}`; where they are whole conversations, `messages` and `{messages: chosen}`",
            )
        )


def new_head(training: Training, labels: Sequence[str], pad_token_id: int | None = None) -> Head | None:
    """The head that rows with these labels are classified by; None where nothing is classified.

    Where the rows that would tell the labels can't be read, those of the recipe, else two.
    """
    named = labels_of(training)
    return None if named is None else Head(tuple(labels or named or NO_LABELS), pad_token_id, training.seed)


def _check_labels(rows: Rows) -> None:
    """Raise DataError where there is nothing to tell apart, and for held-out rows whose label is never learned."""
    held_out, names = Examples.of(rows.held_out), list(rows.report.labels)
    learned = set(Examples.of(rows.train).labels.tolist())
    if len(learned) < 2:
        what = f"every training row has the label `{quote(names[learned.pop()])}`"
        raise DataError(Problem(what, fix="add rows of another label: with one alone there is nothing to tell apart"))
    if unknown := held_out.take(np.flatnonzero(~np.isin(held_out.labels, list(learned)))):
        raise DataError(
            *(
                Problem(
                    f"the held-out row has the label `{quote(names[example.label])}`, and no training row has it",
                    where=str(example.row),
                    fix="add training rows with this label, or take the row out",
                )
                for example in unknown[:NAMED]
            )
        )


def _loader(
    data: Data, folder: Path, tokenizer: "PreTrainedTokenizerBase", progress: OnTokenized | None
) -> Callable[..., Loaded]:
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
        progress=progress,
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
