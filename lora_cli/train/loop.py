"""Training: a generator of events.

One step: the rows of the step, the same on any number of devices, are dealt to the ranks and cut into micro-batches;
each adds its loss, a sum, divided once by the items of the whole step; then clip, step, and say what happened.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer

from lora_cli.data.types import Batch
from lora_cli.errors import DivergedError, Problem
from lora_cli.lora.inject import derived_seed
from lora_cli.train.events import Evaluated, Event, Finished, Sampled, Saved, Step
from lora_cli.train.layout import Layout, Rows, micro_batches
from lora_cli.train.optim import Parameters, Schedule, set_learning_rate
from lora_cli.train.task import Task


@dataclass(frozen=True)
class Settings:
    """How the loop goes about it, with every `auto` resolved."""

    layout: Layout
    seed: int = 0
    max_grad_norm: float = 0.0
    eval_steps: int | None = None
    save_steps: int | None = None
    max_seconds: float | None = None
    patience: int | None = None


@dataclass
class Progress:
    """Where a run stands: what a checkpoint has to remember beside adapter and optimizer."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    evaluations_without_gain: int = 0


@dataclass(frozen=True)
class Actions:
    """What the loop calls when it is due: made by the run, so that the loop knows no folders and no held-out rows."""

    evaluate: Callable[[], tuple[float, int]] | None  # -> mean loss in nats, trained tokens
    sample: Callable[[], dict[str, str]] | None  # -> answers by prompt
    save: Callable[[Progress], str]  # -> where


def train(
    task: Task,
    optimizer: Optimizer,
    parameters: Parameters,
    steps: Iterable[tuple[int, Rows]],
    *,
    last_step: int,
    schedule: Schedule,
    settings: Settings,
    actions: Actions,
    progress: Progress,
    accelerator: Accelerator,
) -> Iterator[Event]:
    """Yield what happens; `steps` gives (steps done, rows of the next). Raises DivergedError for non-finite values."""
    clock = _Clock(progress.seconds)
    reason, measured_at = "all steps", None
    if progress.step == 0:
        yield from _measure(actions, progress)
    for done, rows in steps:
        number = done + 1
        lr = set_learning_rate(optimizer, schedule(number))
        began = time.perf_counter()
        loss, grad_norm = _take_step(task, optimizer, parameters, number, rows, settings, accelerator)
        progress.step, progress.seconds = number, clock.seconds
        progress.tokens += sum(weight > 0 for row in rows for weight in row.weights)
        yield Step(
            number,
            *_finite(number, loss, lr, grad_norm, rows),
            tokens=progress.tokens,
            tokens_per_second=sum(len(row.input_ids) for row in rows) / (time.perf_counter() - began),
            seconds=progress.seconds,
        )
        if _due(settings.eval_steps, number):
            measured_at = number
            yield from _measure(actions, progress)
        reason = _reason_to_stop(progress, settings, clock, accelerator) or reason
        if number == last_step or reason != "all steps" or _due(settings.save_steps, number):
            yield Saved(number, actions.save(progress))
        if reason != "all steps":
            break
    if measured_at != progress.step:
        yield from _measure(actions, progress)
    yield Finished(progress.step, reason, clock.seconds, _peak_bytes(accelerator.device))


def _take_step(
    task: Task,
    optimizer: Optimizer,
    parameters: Parameters,
    number: int,
    rows: Rows,
    settings: Settings,
    accelerator: Accelerator,
) -> tuple[Tensor, Tensor]:
    """One optimizer step; its mean loss and gradient norm stay on the device. Nothing in here waits for the device."""
    items = sum(row.items for row in rows)
    batches = micro_batches(rows, settings.layout, rank=accelerator.process_index, processes=accelerator.num_processes)
    total = torch.zeros((), device=accelerator.device)
    for i, (first, batch) in enumerate(batches):
        torch.manual_seed(derived_seed(settings.seed, "dropout", number, first))
        last = i == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(task):
            loss = task(to_device(batch, accelerator.device))
            # DDP averages gradients over processes; we want their sum over `items`
            accelerator.backward(loss.total * (accelerator.num_processes / items))
        total += loss.total.detach()
    grad_norm = accelerator.clip_grad_norm_(list(parameters.values()), settings.max_grad_norm or math.inf)
    optimizer.step()
    optimizer.zero_grad()
    return accelerator.reduce(total, "sum") / items, grad_norm


def _measure(actions: Actions, progress: Progress) -> Iterator[Event]:
    if actions.evaluate:
        loss, tokens = actions.evaluate()
        if not math.isfinite(loss):
            raise DivergedError(
                Problem(
                    f"after step {progress.step} the held-out loss is {loss}",
                    fix="lower `training.learning_rate`; the last checkpoint is untouched",
                )
            )
        best = progress.best_loss is None or loss < progress.best_loss
        progress.best_loss = loss if best else progress.best_loss
        progress.evaluations_without_gain = 0 if best else progress.evaluations_without_gain + 1
        yield Evaluated(progress.step, loss, math.exp(min(loss, 700)), tokens, best)
    if actions.sample:
        yield Sampled(progress.step, actions.sample())


def _reason_to_stop(progress: Progress, settings: Settings, clock: "_Clock", accelerator: Accelerator) -> str | None:
    if settings.patience and progress.evaluations_without_gain >= settings.patience:
        return "early stopping"
    if settings.max_seconds is None:
        return None
    # clocks differ between processes: all stop when one would
    late = torch.tensor(float(clock.seconds >= settings.max_seconds), device=accelerator.device)
    return "max_time" if accelerator.reduce(late, "sum").item() > 0 else None


def _finite(number: int, loss: Tensor, lr: float, grad_norm: Tensor, rows: Rows) -> tuple[float, float, float]:
    values = loss.item(), float(grad_norm)
    if not all(map(math.isfinite, values)):
        raise DivergedError(
            Problem(
                f"step {number} has a loss of {values[0]} and a gradient norm of {values[1]}",
                where=", ".join(str(row.row) for row in rows[:8]),
                fix="lower `training.learning_rate`, or look at these rows; the last checkpoint is untouched",
            )
        )
    return values[0], lr, values[1]


def _due(every: int | None, number: int) -> bool:
    return every is not None and number % every == 0


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}  # type: ignore[return-value]


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Clock:
    """Seconds of training, over all sessions of a run."""

    def __init__(self, before: float) -> None:
        self.before = before
        self.began = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.began
