"""One step of each session is measured, so that the prediction of memory is held against what a step really needs."""

import logging
from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor
from torch.optim import Optimizer

from lora_cli.budget.step import Batch, step_memory
from lora_cli.data.order import steps
from lora_cli.data.types import Batch as Tensors
from lora_cli.lora.weights import stored_in
from lora_cli.runs.decision import Decision
from lora_cli.runs.parts import Run
from lora_cli.train.events import Event, Finished, Memory, Step
from lora_cli.train.layout import Layout, micro_batches
from lora_cli.train.meter import measured
from lora_cli.train.progress import Progress

log = logging.getLogger(__name__)


def metered(events: Iterator[Event], run: Run, optimizer: Optimizer, progress: Progress) -> Iterator[Event]:
    """The same events, with a Memory behind the session's second step, the first to find the optimizer's state there."""
    if run.decision.planned is None or not run.accelerator.is_main_process:
        yield from events
        return
    yield from _until_step(events)
    event, before = None, 0
    while not isinstance(event, Step):
        with measured(run.accelerator.device, _held(run, optimizer)) as peak:
            event = next(events, None)
        before = max(before, peak.before)
        if event is None:
            return
        yield _with_peak(event, before)
    predicted = predicted_bytes(run, event.step, progress.layout)
    _warn_if_short(run.decision, peak.bytes / predicted)
    yield Memory(event.step, predicted, peak.bytes)
    for event in events:
        yield _with_peak(event, before)


def predicted_bytes(run: Run, number: int, layout: Layout) -> int:
    """The peak of the step of this number, from the shapes of its forwards on this process."""
    _, rows = next(steps(run.rows.train, run.plan, seed=run.recipe.training.seed, start=number - 1))
    accelerator = run.accelerator
    found = micro_batches(rows, layout, rank=accelerator.process_index, processes=accelerator.num_processes)
    return max(_predicted(run.decision, batch, alone=len(found) == 1) for _, batch in found)


def _until_step(events: Iterator[Event]) -> Iterator[Event]:
    for event in events:
        yield event
        if isinstance(event, Step):
            return


def _with_peak(event: Event, before: int) -> Event:
    """The peak of the whole run, which the allocator has forgotten for the measurement."""
    return replace(event, peak_bytes=max(event.peak_bytes, before)) if isinstance(event, Finished | Step) else event


def _predicted(decided: Decision, tensors: Tensors, *, alone: bool) -> int:
    """Of one forward and backward; `alone` in its step, it finds no gradients there."""
    rows, length = tensors["input_ids"].shape
    batch = Batch(rows, length, rows * tensors["positions"].numel())
    setup = decided.setup
    if "documents" not in tensors and decided.layout.row_length:
        setup = replace(setup, how=replace(setup.how, masked=False))
    memory = step_memory(setup, batch, decided.recompute)
    return max(memory.total - alone * memory.gradients, memory.standing)  # gradients come while activations go


def _held(run: Run, optimizer: Optimizer) -> list[Tensor]:
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    base = [tensor for module in run.model.modules() for tensor in stored_in(module)]
    return [*base, *run.model.buffers(), *state]


def _warn_if_short(decided: Decision, ratio: float) -> None:
    """Where the largest step, by what this one has shown, would not fit."""
    needed = decided.planned.needed * ratio
    if needed > decided.room:
        log.warning(
            "a step of the longest rows may need %.1f GB, and %.1f GB are free; fix: lower `training.micro_batch_size`",
            needed / 1e9,
            decided.room / 1e9,
        )
