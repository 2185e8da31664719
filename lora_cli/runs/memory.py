"""How a run spends its memory: what a recipe leaves `auto` is decided here, from shapes, rows and what is free. No torch."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.budget.activations import How
from lora_cli.budget.params import adapted_linears
from lora_cli.budget.plan import Lengths, Limits, Option, choose
from lora_cli.budget.quantised import QUANTIZE, quantised_by
from lora_cli.budget.shapes import ModelShape
from lora_cli.budget.speed import Rates
from lora_cli.budget.step import Setup
from lora_cli.errors import ModelError, Problem
from lora_cli.kernels.sizes import LOGITS_AT_ONCE
from lora_cli.lora.config import TAKEN_OFF
from lora_cli.models.recompute import recompute_of
from lora_cli.recipe.schema import Recipe, labels_of

if TYPE_CHECKING:
    from lora_cli.data.examples import Examples

# Tokens of one forward: a GPU needs many to be busy; a CPU loses more to attention over long rows than it gains
TOKENS_PER_FORWARD = {"cpu": 512, "cuda": 16384}
# Where a device's own rates are unknown, those of an H100: what is compared is one way to run with another
TYPICAL = {"cpu": Rates(1e11, 2e10, launches=False), "cuda": Rates(989e12, 3.35e12)}
NUMBER = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes
EAGER = ("gemma2", "gptj", "gpt3")  # what transformers runs without sdpa


@dataclass(frozen=True)
class Place:
    """Where a run takes place: the kind of device, bytes that weights and step may have together, and its rates."""

    kind: str  # cpu | cuda
    room: float
    rates: Rates
    processes: int = 1


def refuse_without_formula(recipe: Recipe) -> None:
    """Raise ModelError for what is trained beside adapters: a classifier's head, and modules trained whole."""
    if labels_of(recipe.training) is None and not recipe.lora.modules_to_save:
        return
    what = "there is no formula for the memory of heads and modules that are trained whole"
    raise ModelError(Problem(what, fix="`lora check` and `lora params` read this recipe; memory is known once it runs"))


def setup_of(
    recipe: Recipe,
    shape: ModelShape,
    *,
    number: int,
    attention: str,
    packed: bool,
    kind: str,
    longest: int,
    widened: bool = False,
    biases: int | None = None,
) -> Setup:
    """What the recipe trains on this base, which may be quantised on disk, with numbers of so many bytes.

    `widened` for products where the device has no others; `biases` where it trains every bias there is.
    """
    lora = recipe.lora
    window = shape.config.get("sliding_window")
    quantised = QUANTIZE[recipe.model.quantize] or quantised_by(shape.config)
    how = How(
        number=number,
        attention=attention,
        masked=packed or (window is not None and longest >= window),
        dropout=0 if lora.dropout == 0 else 1 if kind == "cuda" else number,
        use_dora=lora.use_dora,
        freeze_A=lora.freeze_A,
        doubled=lora.init in TAKEN_OFF,
        holds_inputs=quantised is not None and quantised.holds_inputs,
        widened=widened,
        logits_at_once=LOGITS_AT_ONCE[kind],
        by_position=kind == "cpu",
    )
    if recipe.training.full:
        inside = tuple(linear for linear in shape.linears if linear.path not in shape.head)
        return Setup(
            shape, inside, replace(lora.config(), r=0, bias="none"), how, optimizer=recipe.training.optimizer, full=True
        )
    adapted = adapted_linears(shape, lora.targets, exclude=lora.exclude, layers=lora.layers)
    if other := [linear.path for linear in adapted if linear in shape.by_name]:
        what = f"there is no formula for the memory of {other[0]} under LoRA, which is no linear layer"
        raise ModelError(
            Problem(what, fix="`lora check` and `lora params` read this recipe; memory is known once it runs")
        )
    return Setup(
        shape,
        tuple(adapted),
        lora.config(),
        how,
        quantised,
        recipe.training.optimizer,
        biases=biases,
        tokens=len(set(lora.trainable_tokens)),
    )


def decide(
    recipe: Recipe,
    setup: Setup,
    lengths: Lengths,
    place: Place,
    *,
    packed: bool,
    factor: float = 1.0,
    forward: tuple[int, int | None] | None = None,
) -> Option:
    """Micro-batch, length of packed rows and checkpointing, with what they will need; of a `forward` of so many rows, of
    so many tokens, the checkpointing alone. `factor` is what a measured step has shown (`choose`)."""
    training = recipe.training
    rows, row_length = forward or (None if training.micro_batch_size == "auto" else training.micro_batch_size, None)
    limits = Limits(
        examples=-(-training.global_batch_size // place.processes),
        tokens=TOKENS_PER_FORWARD[place.kind],
        pack_to=recipe.data.max_length if packed else None,
        micro_batch=rows,
        row_length=row_length,
        recompute=recompute_of(training.gradient_checkpointing),
    )
    return choose(setup, lengths, limits, place.rates, room=place.room, factor=factor)


def lengths_of(examples: "Examples") -> Lengths:
    """Of rows that are there."""
    tokens = examples.tokens
    return Lengths(int(examples.lengths.max()), tokens / len(examples), examples.trained_tokens / tokens)


def attention_of(recipe: Recipe, shape: ModelShape) -> str:
    """transformers' name of the kernel that a recipe comes to."""
    named = {"flash": "flash_attention_2", "flex": "flex_attention"}
    asked = recipe.model.attention
    if asked == "auto":
        return "eager" if shape.model_type in EAGER else "sdpa"
    return named.get(asked, asked)


def free_host_memory() -> float:
    """Bytes that this process may still take: what the system has, or its control group allows. Infinite where unknown."""
    return min(_available(), _allowed())


def _available() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return _physical() / 2
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), _physical() / 2)


def _physical() -> float:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        return float("inf")


def _allowed() -> float:
    group = Path("/sys/fs/cgroup")
    try:
        most, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return float("inf")
    return float("inf") if most == "max" else max(0.0, float(most) - used)
