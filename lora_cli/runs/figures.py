"""The rows of a recipe in numbers: how many, how long, what is trained, what repeats, how full the forwards are."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from lora_cli.data.duplicates import exact_duplicates, near_duplicates
from lora_cli.data.pipeline import DataReport, steps
from lora_cli.data.types import Example
from lora_cli.models.load import default_device
from lora_cli.recipe.schema import Recipe, labels_of
from lora_cli.runs.parts import Rows
from lora_cli.runs.rows import planned
from lora_cli.train import auto
from lora_cli.train.layout import Layout, filled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BARS = 8
COMPARED = 10_000  # examples among which near duplicates are looked for
NAMED = 5  # pairs that are named
MEASURED = 20  # steps whose filling is measured


@dataclass(frozen=True)
class Bar:
    """Examples of `least` to `most` tokens, before max_length; `most` is None for all that are longer."""

    least: int
    most: int | None
    examples: int


@dataclass(frozen=True)
class Repeats:
    """Examples that an earlier one makes superfluous, and the first of them with the earlier ones."""

    exact: int
    near: int
    compared: int  # examples among which near ones were looked for
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Figures:
    report: DataReport  # of data.train; with held-out rows where they are a share of it
    max_length: int
    train: int
    held_out: int
    tokens: int
    trained_tokens: int
    histogram: tuple[Bar, ...]
    repeats: Repeats
    steps: int
    examples_a_step: int
    row_length: int | None  # of packed rows
    filled: float | None  # share of the forwards' tokens that is no padding; None without a model


def figures_of(recipe: Recipe, rows: Rows, model: "PreTrainedModel | None") -> Figures:
    examples = [*rows.train, *rows.held_out]
    layout = step_layout(recipe, examples, model) if model else None
    return Figures(
        report=rows.report,
        max_length=recipe.data.max_length,
        train=len(rows.train),
        held_out=len(rows.held_out),
        tokens=sum(len(example.input_ids) for example in examples),
        trained_tokens=_trained(examples),
        histogram=histogram([example.full_length for example in examples], rows.report.lengths.p99),
        repeats=_repeats(examples),
        steps=planned(recipe, rows).steps,
        examples_a_step=recipe.training.global_batch_size,
        row_length=layout.row_length if layout else None,
        filled=_filled(recipe, rows, layout) if layout else None,
    )


def histogram(lengths: Sequence[int], most: int) -> tuple[Bar, ...]:
    """About BARS bars of a power of two up to `most`, and one for what is longer."""
    width = 1 << max(0, -(-most // BARS) - 1).bit_length()
    edges = range(0, -(-most // width) * width, width)
    bars = [Bar(low + 1, low + width, sum(low < length <= low + width for length in lengths)) for low in edges]
    beyond = edges[-1] + width if edges else 0
    longer = sum(length > beyond for length in lengths)
    return (*bars, Bar(beyond + 1, None, longer)) if longer else tuple(bars)


def step_layout(recipe: Recipe, examples: Sequence[Example], model: "PreTrainedModel") -> Layout:
    """The layout that training on one device of this machine would take, if the model keeps packed rows apart."""
    return auto.layout(
        recipe.training,
        longest=max(len(example.input_ids) for example in examples),
        vocabulary=model.config.vocab_size,
        processes=1,
        device=default_device(),
        pack_to=recipe.data.max_length if recipe.data.packing and labels_of(recipe.training) is None else None,
    )


def _filled(recipe: Recipe, rows: Rows, layout: Layout) -> float:
    taken = [step for _, step in islice(steps(rows.train, planned(recipe, rows), seed=recipe.training.seed), MEASURED)]
    return sum(filled(step, layout) for step in taken) / len(taken)


def _repeats(examples: Sequence[Example]) -> Repeats:
    exact, near = exact_duplicates(examples), near_duplicates(examples[:COMPARED])
    pairs = [(str(examples[place].row), str(examples[before].row)) for place, before in [*exact, *near][:NAMED]]
    return Repeats(len(exact), len(near), min(len(examples), COMPARED), tuple(pairs))


def _trained(examples: Sequence[Example]) -> int:
    return sum(weight > 0 for example in examples for weight in example.weights)
