"""Model and objective as one module, so that DDP and FSDP see exactly one forward per batch, and what is learned by it."""

from dataclasses import dataclass
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import nn

from lora_cli.data.types import Batch
from lora_cli.lora.shards import InShards
from lora_cli.objectives.base import Loss, Objective, without_graph


class Task(nn.Module):
    """`products` is the type to multiply in where it is not that of the weights: of float32 masters, all of them trained."""

    def __init__(self, model: nn.Module, objective: Objective, *, products: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.products = products

    def forward(self, batch: Batch) -> Loss:
        with torch.autocast(batch["input_ids"].device.type, self.products, enabled=self.products is not None):
            if isinstance(self.model, InShards):  # a loss may ask for the head when the model's own forward is over
                return self.model.run(self.objective, self.model, batch)
            return self.objective(self.model, batch)


class Learn(Protocol):
    """One forward and backward: the gradient of the batch's loss, a sum, over `items` joins that of the parameters.

    `seed` is what dropout is drawn from. Returns the loss without its graph. Held-out rows are measured by the `task`.
    """

    task: nn.Module

    def __call__(self, batch: Batch, items: float, seed: int) -> Loss: ...


@dataclass(frozen=True)
class Learning:
    """By a task of this process alone, or by one wrapped for several of them, whose gradients are added up later."""

    task: nn.Module
    accelerator: Accelerator

    def __call__(self, batch: Batch, items: float, seed: int) -> Loss:
        torch.manual_seed(seed)
        with self.accelerator.no_sync(self.task):
            loss = self.task(to_device(batch, self.accelerator.device))
            self.accelerator.backward(loss.total / items)
        return without_graph(loss)


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}  # type: ignore[return-value]
