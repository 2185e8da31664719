"""The rows of a recipe in numbers: how many, how long, what is trained, what repeats, how full the forwards are."""

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from lora_cli.budget.modules import biases_of
from lora_cli.data.duplicates import exact_duplicates, near_duplicates
from lora_cli.data.examples import Array, Examples
from lora_cli.data.order import steps
from lora_cli.data.report import DataReport
from lora_cli.models.load import default_device, resolve_dtype
from lora_cli.models.recompute import setting_of
from lora_cli.recipe.schema import Recipe, labels_of
from lora_cli.runs.decision import Decision, decision
from lora_cli.runs.parts import Rows
from lora_cli.runs.rows import planned
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
    """Examples that an earlier one makes superfluous, and the first of them, exact ones first, with the earlier ones."""

    exact: int
    near: int
    compared: int  # examples among which near ones were looked for
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Memory:
    """What a step needs of the bytes that are free, how many tokens a forward, and what is computed again (as in a recipe)."""

    needed: int
    free: float
    tokens: int
    gradient_checkpointing: str | bool | int


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
    memory: Memory | None  # of a step on this machine; None where it can't be predicted
    filled: float | None  # share of the forwards' tokens that is no padding; None without a model


def figures_of(recipe: Recipe, rows: Rows, model: "PreTrainedModel | None") -> Figures:
    examples = rows.all
    decided = step_decision(recipe, examples, model) if model else None
    layout = decided.layout if decided else None
    return Figures(
        report=rows.report,
        max_length=recipe.data.max_length,
        train=len(rows.train),
        held_out=len(rows.held_out),
        tokens=examples.tokens,
        trained_tokens=examples.trained_tokens,
        histogram=histogram(examples.lengths + examples.column("cut"), rows.report.lengths.p99),
        repeats=_repeats(examples),
        steps=planned(recipe, rows).steps,
        examples_a_step=recipe.training.global_batch_size,
        row_length=layout.row_length if layout else None,
        memory=_memory(decided) if decided and decided.planned else None,
        filled=_filled(recipe, rows, layout) if layout else None,
    )


def histogram(lengths: Array, most: int) -> tuple[Bar, ...]:
    """About BARS bars of a power of two up to `most`, and one for what is longer."""
    width = 1 << max(0, -(-most // BARS) - 1).bit_length()
    edges = range(0, -(-most // width) * width, width)
    bars = [Bar(low + 1, low + width, int(((low < lengths) & (lengths <= low + width)).sum())) for low in edges]
    beyond = edges[-1] + width if edges else 0
    longer = int((lengths > beyond).sum())
    return (*bars, Bar(beyond + 1, None, longer)) if longer else tuple(bars)


def step_decision(recipe: Recipe, examples: Examples, model: "PreTrainedModel") -> Decision:
    """What training on one device of this machine would take, if the model keeps packed rows apart."""
    device, bias = default_device(), recipe.lora.bias
    return decision(
        recipe,
        examples,
        model,
        dtype=resolve_dtype(recipe.model.dtype, device),
        device=device,
        packed=recipe.data.packing and labels_of(recipe.training) is None,
        biases=biases_of(model, bias) if bias == "all" else None,
    )


def _memory(decided: Decision) -> Memory:
    option = decided.planned
    return Memory(option.needed, decided.room, option.batch.tokens, setting_of(decided.recompute))


def _filled(recipe: Recipe, rows: Rows, layout: Layout) -> float:
    taken = [step for _, step in islice(steps(rows.train, planned(recipe, rows), seed=recipe.training.seed), MEASURED)]
    return sum(filled(step, layout) for step in taken) / len(taken)


def _repeats(examples: Examples) -> Repeats:
    exact, near = exact_duplicates(examples), near_duplicates(examples[:COMPARED])
    pairs = [(str(examples[place].row), str(examples[before].row)) for place, before in [*exact, *near][:NAMED]]
    return Repeats(len(exact), len(near), min(len(examples), COMPARED), tuple(pairs))
