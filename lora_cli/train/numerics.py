"""What the loss and the gradient norm of a step say: apply it, leave it out, or end a run that has diverged."""

from collections.abc import Sequence
from statistics import median

from lora_cli.data.types import Example
from lora_cli.errors import DivergedError, Problem
from lora_cli.train.progress import Progress

IN_A_ROW = 3  # steps left out one after the other: the run is beyond help
SELDOM, OF_STEPS = 5, 1000  # so many among so many: not the rows of one step, but the run
SPIKE = 20  # times the median of the gradient norms
REMEMBERED, ENOUGH = 64, 16  # gradient norms that are kept, and that a median needs
NAMED = 8


def is_spike(grad_norm: float, progress: Progress) -> bool:
    """Far above what this run's gradients are like."""
    return len(progress.grad_norms) >= ENOUGH and grad_norm > SPIKE * typical(progress)


def typical(progress: Progress) -> float:
    """The median of the latest gradient norms."""
    return median(progress.grad_norms)


def remember(progress: Progress, grad_norm: float) -> None:
    progress.grad_norms = [*progress.grad_norms, grad_norm][-REMEMBERED:]


def with_step(skipped: Sequence[int], step: int) -> list[int]:
    """The latest steps that were left out, and this one."""
    return [number for number in skipped if number > step - OF_STEPS] + [step]


def refuse_too_many(progress: Progress, loss: float, grad_norm: float, lr: float, rows: Sequence[Example]) -> None:
    """Raise DivergedError where the steps that were left out are more than bad luck."""
    step, skipped = progress.step, progress.skipped
    in_a_row = skipped[-IN_A_ROW:] == list(range(step - IN_A_ROW + 1, step + 1))
    if not in_a_row and len(skipped) < SELDOM:
        return
    many = f"{IN_A_ROW} steps in a row" if in_a_row else f"{SELDOM} of the last {OF_STEPS:,} steps"
    raise DivergedError(
        Problem(
            f"{many} could not be applied: step {step} has {described(loss, grad_norm)}, "
            f"at a learning rate of {lr:.2g}",
            where=names(rows),
            fix="lower `training.learning_rate`, or look at these rows; the last checkpoint is untouched",
        )
    )


def described(loss: float, grad_norm: float) -> str:
    return f"a loss of {loss:.6g} and a gradient norm of {grad_norm:.6g}"


def names(rows: Sequence[Example]) -> str:
    """The first of the rows by source and line, and how many more there are."""
    named = list(dict.fromkeys(str(row.row) for row in rows))
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    return ", ".join(named[:NAMED]) + more
