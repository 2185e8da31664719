"""One step of each session is measured, so that the prediction of memory is held against what a step really needs."""

import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer

from lora_cli.budget.step import Batch, step_memory
from lora_cli.data.order import steps
from lora_cli.data.types import Batch as Tensors
from lora_cli.lora.weights import stored_in
from lora_cli.models.recompute import Recompute, checkpoint_activations, setting_of
from lora_cli.runs.decision import Decision, calibrated
from lora_cli.runs.parts import Run
from lora_cli.train.events import Event, Finished, Memory, Relaid, Step
from lora_cli.train.layout import micro_batches
from lora_cli.train.meter import measured
from lora_cli.train.progress import Progress

log = logging.getLogger(__name__)

CLOSE = 0.05  # how far a prediction may be off, as a share
LEAST_FACTOR = 0.5  # that is believed: a step of few short rows says little of the longest ones


def metered(events: Iterator[Event], run: Run, optimizer: Optimizer, progress: Progress) -> Iterator[Event]:
    """The same events, with a Memory behind the session's first step that finds the optimizer's state there: the second of
    a new run, the first of a resumed one. Where that is the first to be measured in the run, what it shows goes into the
    plan (`_calibrated`): a resumed run measures the same step as one that was never stopped, or finds it done.
    """
    if run.decision.planned is None:
        yield from events
        return
    if not optimizer.state:
        yield from _until_step(events)
    event, before = None, 0
    while not isinstance(event, Step):
        with measured(run.accelerator.device, _held(run, optimizer)) as peak:
            event = next(events, None)
        before = max(before, peak.before)
        if event is None:
            return
        yield _with_peak(event, before)
    predicted = predicted_bytes(run, event.step, progress)
    yield Memory(event.step, predicted, peak.bytes)
    if progress.factor is None:
        yield from _calibrated(run, progress, predicted, peak.bytes)
    for event in events:
        yield _with_peak(event, before)


def predicted_bytes(run: Run, number: int, progress: Progress) -> int:
    """The peak of the step of this number, from the shapes of its forwards on this process."""
    _, rows = next(steps(run.rows.train, run.plan, seed=run.recipe.training.seed, start=number - 1))
    accelerator = run.accelerator
    found = micro_batches(rows, progress.layout, rank=accelerator.process_index, processes=accelerator.num_processes)
    recompute = recompute_now(run, progress)
    return max(_predicted(run.decision, recompute, batch, alone=len(found) == 1) for _, batch in found)


def recompute_now(run: Run, progress: Progress) -> Recompute:
    """What is computed again: as decided before the first step, or as a measured step has shown to be better."""
    return run.decision.recompute if progress.recompute is None else progress.recompute


def _calibrated(run: Run, progress: Progress, predicted: int, peak: int) -> Iterator[Event]:
    """Between two steps: where a prediction was too far off, the rest of the run is laid out by what was measured.

    The checkpoint of this step has it already, so that a resumed run does as this one; one that is resumed before it
    measures the same step, whose bytes are the same to some tensors of single numbers: so two digits count.
    """
    standing = run.decision.planned.memory.standing
    factor = round(_most((peak - standing) / max(1, predicted - standing), run.accelerator), 2)
    progress.factor = factor if _most(abs(peak / predicted - 1), run.accelerator) > CLOSE else 1.0
    if progress.factor == 1.0:
        return
    found = calibrated(run.recipe, run.decision, progress.layout, max(progress.factor, LEAST_FACTOR))
    if (found.layout, found.recompute) != (progress.layout, recompute_now(run, progress)):
        progress.layout, progress.recompute = found.layout, found.recompute
        checkpoint_activations(run.model, found.recompute)
        yield Relaid(
            progress.step,
            factor,
            found.layout.micro_batch_size,
            found.layout.row_length,
            setting_of(found.recompute),
        )
    if not found.fits:
        log.warning(
            "a step of the longest rows may need %.1f GB, and %.1f GB are free; fix: lower `training.micro_batch_size`",
            found.planned.needed / 1e9,
            found.room / 1e9,
        )


def _most(value: float, accelerator: Accelerator) -> float:
    """Of all processes, so that they go on alike."""
    if accelerator.num_processes == 1:
        return value
    return accelerator.gather(torch.tensor([value], device=accelerator.device)).max().item()


def _until_step(events: Iterator[Event]) -> Iterator[Event]:
    for event in events:
        yield event
        if isinstance(event, Step):
            return


def _with_peak(event: Event, before: int) -> Event:
    """The peak of the whole run, which the allocator has forgotten for the measurement."""
    return replace(event, peak_bytes=max(event.peak_bytes, before)) if isinstance(event, Finished | Step) else event


def _predicted(decided: Decision, recompute: Recompute, tensors: Tensors, *, alone: bool) -> int:
    """Of one forward and backward; `alone` in its step, it finds no gradients there."""
    rows, length = tensors["input_ids"].shape
    batch = Batch(rows, length, rows * tensors["positions"].numel())
    setup = decided.setup
    if "documents" not in tensors and decided.layout.row_length:
        setup = replace(setup, how=replace(setup.how, masked=False))
    memory = step_memory(setup, batch, recompute)
    return max(memory.total - alone * memory.gradients, memory.standing)  # gradients come while activations go


def _held(run: Run, optimizer: Optimizer) -> list[Tensor]:
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    base = [tensor for module in run.model.modules() for tensor in stored_in(module)]
    return [*base, *run.model.buffers(), *state]
