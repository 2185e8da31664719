"""Training: a generator of events.

One step: the rows of the step, the same on any number of devices, are dealt to the ranks and cut into micro-batches;
each adds its loss, a sum, divided once by the items of the whole step; then clip, step, and say what happened.

What can go wrong in a step has a file each: `ranks.py` (asked to stop), `memory.py` (too large), `numerics.py` (not
finite, or a spike). A step is applied whole or not at all, so stopping anywhere is standing behind the one before.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer

from lora_cli.data.types import Batch, Example
from lora_cli.errors import DivergedError, Problem
from lora_cli.lora.inject import derived_seed
from lora_cli.lora.shards import gathered
from lora_cli.objectives.base import BY_SOURCE, Loss
from lora_cli.train import numerics
from lora_cli.train.events import (
    Evaluated,
    Event,
    Finished,
    Interrupted,
    OutOfMemory,
    Sampled,
    Saved,
    Skipped,
    Spike,
    Step,
)
from lora_cli.train.layout import Layout, Rows, examples_of, micro_batches
from lora_cli.train.memory import StartAgain, free_memory, rehearsed, smaller
from lora_cli.train.optim import Parameters, set_learning_rate
from lora_cli.train.parallel import sum_gradients
from lora_cli.train.progress import Progress
from lora_cli.train.ranks import MemoryShort, Ranks, Stopped
from lora_cli.train.rewind import Rewind
from lora_cli.train.schedule import Schedule
from lora_cli.train.task import Learn


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
    keep_best: bool = False
    sources: Sequence[str] = ()  # whose losses are told apart


class Measured(NamedTuple):
    """Held-out rows: mean loss in nats, trained tokens, the mean loss of each source where there are several, and what
    the objective measures beside it."""

    loss: float
    tokens: int
    sources: Mapping[str, float] = {}
    metrics: Mapping[str, float] = {}


@dataclass(frozen=True)
class Actions:
    """What the loop calls when it is due: made by the run, so that the loop knows no folders and no held-out rows."""

    evaluate: Callable[[], Measured] | None
    sample: Callable[[], dict[str, str]] | None  # -> answers by prompt
    save: Callable[[Progress], str]  # -> where


@dataclass(frozen=True)
class Parts:
    """What every step works on."""

    learn: Learn
    optimizer: Optimizer
    parameters: Parameters
    schedule: Schedule
    settings: Settings
    accelerator: Accelerator
    ranks: Ranks
    rewind: Rewind | None  # where a spike takes the weights back


def train(
    parts: Parts,
    steps: Iterable[tuple[int, Rows]],
    *,
    last_step: int,
    actions: Actions,
    progress: Progress,
    rehearsal: Rows | None = None,
) -> Iterator[Event]:
    """Yield what happens; `steps` gives (steps done, rows of the next), `rehearsal` the rows of the step with the longest.

    A run that is asked to stop ends with Interrupted. Raises DivergedError and OutOfMemoryError where nothing helps.
    """
    clock = _Clock(progress.seconds)
    progress.layout = progress.layout or parts.settings.layout
    began, saved = progress.step, progress.step
    rows_of = iter(steps)
    try:
        if rehearsal:
            yield from _fitting(parts, progress, rehearsal, lambda: _rehearse(parts, progress, rehearsal))
        while True:
            reason = _reason_to_end(parts, progress, last_step, clock, new=progress.step == began)
            if progress.step == 0 or reason or _due(parts.settings.eval_steps, progress.step):
                yield from _measure(actions, progress)
            reason = reason or _no_gain(parts.settings, progress)
            if progress.step > saved and (reason or _worth_saving(parts.settings, progress)):
                saved = progress.step
                yield Saved(saved, actions.save(progress))
            if reason:
                break
            _, rows = next(rows_of)
            yield from _step(parts, progress, rows, clock)
    except Stopped:
        if progress.step > saved:
            saved = progress.step
            yield Saved(saved, actions.save(progress))
        yield Interrupted(progress.step, saved)
        return
    adapter_step = progress.kept_step if parts.settings.keep_best else None
    yield Finished(
        progress.step, reason, clock.seconds, _peak_bytes(parts.accelerator.device), adapter_step or progress.step
    )


def _step(parts: Parts, progress: Progress, rows: Rows, clock: "_Clock") -> Iterator[Event]:
    """One optimizer step, or the reason why its update was left out."""
    number, began = progress.step + 1, time.perf_counter()
    lr = set_learning_rate(parts.optimizer, parts.schedule(number))
    sums = yield from _fitting(parts, progress, rows, lambda: _gradients(parts, number, rows, progress))
    # the one time in a step that the device is waited for
    items = sum(row.items for row in rows)
    loss, grad_norm = sums.total.item() / items, float(sums.grad_norm)
    spike = numerics.is_spike(grad_norm, progress)
    progress.step, progress.seconds = number, clock.seconds
    if not math.isfinite(loss) or not math.isfinite(grad_norm) or (spike and parts.rewind):
        parts.optimizer.zero_grad()
        yield _skipped(parts, progress, sums, loss, grad_norm, rows)
        numerics.refuse_too_many(progress, loss, grad_norm, lr, rows)
        return
    parts.optimizer.step()
    parts.optimizer.zero_grad()
    progress.tokens += sum(weight > 0 for row in rows for weight in row.weights)
    yield Step(
        number,
        loss,
        lr,
        grad_norm,
        tokens=progress.tokens,
        tokens_per_second=sum(len(row.input_ids) for row in rows) / (time.perf_counter() - began),
        seconds=progress.seconds,
        peak_bytes=_peak_bytes(parts.accelerator.device),
        sources=source_losses(sums.metrics, rows, parts.settings.sources),
    )
    if spike:
        yield Spike(number, grad_norm, numerics.typical(progress), numerics.names(rows))
    numerics.remember(progress, grad_norm)
    if parts.rewind:
        parts.rewind.note(number, parts.parameters, parts.optimizer)


@dataclass
class Sums:
    """Of a step, on the device; `forwards` are the losses of this rank's micro-batches."""

    total: Tensor
    metrics: Mapping[str, Tensor]
    grad_norm: Tensor
    forwards: Tensor


def _gradients(parts: Parts, number: int, rows: Rows, progress: Progress) -> Sums:
    """The gradient of the step's mean loss, in the parameters of every rank. Nothing in here waits for the device."""
    accelerator = parts.accelerator
    items = sum(row.items for row in rows)
    losses = []
    parts.optimizer.zero_grad()
    for place, (first, batch) in enumerate(_batches(parts, rows, progress.layout)):
        dropout = derived_seed(parts.settings.seed, "dropout", number, first)
        with parts.ranks.together(place):
            losses.append(parts.learn(batch, items, dropout))
        progress.fitted = max(progress.fitted, batch["input_ids"].numel())
    sum_gradients(parts.parameters, accelerator)
    grad_norm = accelerator.clip_grad_norm_(list(parts.parameters.values()), parts.settings.max_grad_norm or math.inf)
    summed = add_losses(losses, accelerator)
    return Sums(summed.total, summed.metrics, gathered(grad_norm), torch.stack([loss.total for loss in losses]))


def _fitting(parts: Parts, progress: Progress, rows: Rows, attempt: Callable[[], Sums | None]) -> Iterator[Event]:
    """What `attempt` returns, tried with ever smaller forwards until memory is enough.

    Raises StartAgain where that can't be done in place.
    """
    while True:
        try:
            return attempt()
        except MemoryShort as short:
            rank, place, others_wait = short.rank, short.place, short.others_wait
        # here the failed forward is out of reach, and its memory can be given back
        parts.optimizer.zero_grad()
        free_memory()
        forward = examples_of(rows, progress.layout, rank=rank, processes=parts.ranks.count)[place]
        progress.layout = smaller(progress.layout, rows, forward, progress.fitted)
        layout = progress.layout
        shortage = OutOfMemory(progress.step + 1, rank, layout.micro_batch_size, layout.row_length)
        if others_wait:
            raise StartAgain(shortage)
        yield shortage


def _rehearse(parts: Parts, progress: Progress, rows: Rows) -> None:
    """The largest forward of the rows, its gradients thrown away: memory runs out in the first minute or never."""
    batches = list(enumerate(_batches(parts, rows, progress.layout)))
    place, (_, batch) = max(batches, key=lambda item: item[1][1]["input_ids"].numel())
    with rehearsed(parts.parameters), parts.ranks.together(place):
        parts.learn(batch, 1.0, seed=0)
        progress.fitted = batch["input_ids"].numel()
    parts.optimizer.zero_grad()


def _batches(parts: Parts, rows: Rows, layout: Layout) -> list[tuple[int, Batch]]:
    ranks = parts.ranks
    return micro_batches(rows, layout, rank=ranks.mine, processes=ranks.count, sources=parts.settings.sources)


def _skipped(parts: Parts, progress: Progress, sums: Sums, loss: float, grad_norm: float, rows: Rows) -> Skipped:
    """Names the rows of the forwards that are not finite, where that tells them apart."""
    progress.skipped = numerics.with_step(progress.skipped, progress.step)
    by_rank = parts.accelerator.gather(sums.forwards.unsqueeze(0)).isfinite().tolist()
    forwards = [examples_of(rows, progress.layout, rank=i, processes=len(by_rank)) for i in range(len(by_rank))]
    suspects = [
        example
        for finite, examples in zip(by_rank, forwards, strict=True)
        for fine, found in zip(finite, examples, strict=True)
        if not fine
        for example in found
        if example.items
    ]
    return Skipped(
        progress.step,
        numerics.described(loss, grad_norm),
        numerics.names(suspects or rows),
        len(progress.skipped),
        parts.rewind.put_back(parts.parameters, parts.optimizer) if parts.rewind else None,
    )


def _measure(actions: Actions, progress: Progress) -> Iterator[Event]:
    """Evaluate and sample, once a step: both are told when both are done, so that nothing is told twice."""
    if progress.measured == progress.step:
        return
    measured = actions.evaluate() if actions.evaluate else None
    answers = actions.sample() if actions.sample else None
    progress.measured = progress.step
    if measured:
        yield _judged(measured, progress)
    if answers is not None:
        yield Sampled(progress.step, answers)


def _judged(measured: Measured, progress: Progress) -> Evaluated:
    loss = measured.loss
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
    if progress.step and (progress.kept_loss is None or loss < progress.kept_loss):
        progress.kept_step, progress.kept_loss = progress.step, loss
    return Evaluated(
        progress.step, loss, math.exp(min(loss, 700)), measured.tokens, best, measured.sources, measured.metrics
    )


def _reason_to_end(parts: Parts, progress: Progress, last_step: int, clock: "_Clock", *, new: bool) -> str | None:
    """Why no step follows. A `new` session takes one before its time is up."""
    if progress.step >= last_step:
        return "all steps"
    if _no_gain(parts.settings, progress):
        return "early stopping"
    if parts.settings.max_seconds is None or new:
        return None
    # clocks differ between processes: all stop when one would
    late = torch.tensor(float(clock.seconds >= parts.settings.max_seconds), device=parts.accelerator.device)
    return "max_time" if parts.accelerator.reduce(late, "sum").item() > 0 else None


def _no_gain(settings: Settings, progress: Progress) -> str | None:
    stop = settings.patience and progress.evaluations_without_gain >= settings.patience
    return "early stopping" if stop else None


def _worth_saving(settings: Settings, progress: Progress) -> bool:
    """A step that was left out is not saved: it may be the first of many."""
    if progress.step in progress.skipped:
        return False
    best = settings.keep_best and progress.kept_step == progress.step
    return best or _due(settings.save_steps, progress.step)


def _due(every: int | None, number: int) -> bool:
    return every is not None and number > 0 and number % every == 0


def add_losses(losses: Sequence[Loss], accelerator: Accelerator) -> Loss:
    """The sum over forwards and processes, in float64, of the losses and of each metric."""
    total = torch.stack([loss.total for loss in losses]).double().sum()
    metrics = {
        name: torch.stack([loss.metrics[name] for loss in losses]).double().sum(dim=0) for name in losses[0].metrics
    }
    return Loss(accelerator.reduce(total, "sum"), accelerator.reduce(metrics, "sum"))


def source_losses(metrics: Mapping[str, Tensor], rows: Iterable[Example], sources: Sequence[str]) -> dict[str, float]:
    """The mean loss of each source that has trained tokens among the rows."""
    if BY_SOURCE not in metrics:
        return {}
    items = dict.fromkeys(sources, 0.0)
    for row in rows:
        items[row.row.source] += row.items
    sums = zip(sources, metrics[BY_SOURCE].tolist(), strict=True)
    return {source: total / items[source] for source, total in sums if items[source]}


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
