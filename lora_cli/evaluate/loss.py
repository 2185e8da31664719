"""The loss on held-out rows: one sum over all trained tokens of all rows, divided once."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator

from lora_cli.data.examples import sources_in
from lora_cli.data.types import Example
from lora_cli.objectives.base import Loss, Measure
from lora_cli.train.layout import Layout, micro_batches
from lora_cli.train.loop import add_losses, source_losses
from lora_cli.train.task import Task, to_device

TOGETHER = 4096  # examples that are batched by length together: in memory, and far more than a forward takes


@dataclass(frozen=True)
class HeldOut:
    """`loss` is the mean over the trained tokens, in nats; `sources` has that of each source, where there are several.

    `metrics` are what the objective measures beside it.
    """

    loss: float
    tokens: int
    rows: int
    sources: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))


def held_out_loss(
    task: Task,
    examples: Sequence[Example],
    layout: Layout,
    accelerator: Accelerator,
    measure: Measure | None = None,
    between: Callable[[], None] = lambda: None,
) -> HeldOut:
    """Evaluate without dropout or gradients; each module's own training flag is put back afterwards.

    Rows are dealt to the processes and batched by length as in training, and `between` is called after each forward.
    Forwards are summed in float64, so the figure does not depend on the number of processes beyond their own rounding.
    `measure` makes figures of the objective's metrics, summed likewise.
    """
    flags = {module: module.training for module in task.modules()}
    task.eval()
    sources = sources_in(examples)
    ranks = {"rank": accelerator.process_index, "processes": accelerator.num_processes}
    losses: list[Loss] = []
    items, tokens = 0.0, 0
    try:
        with torch.no_grad():  # shards gathered in inference mode could not be trained with afterwards
            for start in range(0, len(examples), TOGETHER):
                rows = list(examples[start : start + TOGETHER])
                for _, batch in micro_batches(rows, layout, **ranks, sources=sources):
                    losses.append(task(to_device(batch, accelerator.device)))
                    between()
                items += sum(row.items for row in rows)
                tokens += sum(weight > 0 for row in rows for weight in row.weights)
    finally:
        for module, training in flags.items():
            module.training = training
    summed = add_losses(losses, accelerator)
    by_source = source_losses(summed.metrics, examples, sources)
    metrics = measure(summed.metrics) if measure else {}
    return HeldOut(summed.total.item() / items, tokens, len(examples), by_source, metrics)
