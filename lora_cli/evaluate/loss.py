"""The loss on held-out rows: one sum over all trained tokens of all rows, divided once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from lora_cli.data.types import Example
from lora_cli.train.layout import Layout, micro_batches
from lora_cli.train.loop import to_device
from lora_cli.train.task import Task


@dataclass(frozen=True)
class HeldOut:
    """`loss` is the mean over the trained tokens, in nats."""

    loss: float
    tokens: int
    rows: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))


def held_out_loss(task: Task, examples: Sequence[Example], layout: Layout, accelerator: Accelerator) -> HeldOut:
    """Evaluate without dropout or gradients; each module's own training flag is put back afterwards.

    Rows are dealt to the processes and batched by length as in training. Each row is summed in float64 with its own
    forward's rounding, so the figure does not depend on the number of processes beyond that.
    """
    flags = {module: module.training for module in task.modules()}
    task.eval()
    total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    batches = micro_batches(list(examples), layout, rank=accelerator.process_index, processes=accelerator.num_processes)
    try:
        with torch.inference_mode():
            for _, batch in batches:
                total += task(to_device(batch, accelerator.device)).total.double()
    finally:
        for module, training in flags.items():
            module.training = training
    items = sum(example.items for example in examples)
    tokens = sum(weight > 0 for example in examples for weight in example.weights)
    return HeldOut(accelerator.reduce(total, "sum").item() / items, tokens, len(examples))
