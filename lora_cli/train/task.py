"""Model and objective as one module, so that DDP and FSDP see exactly one forward per batch."""

from torch import nn

from lora_cli.data.types import Batch
from lora_cli.objectives.base import Loss, Objective


class Task(nn.Module):
    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch) -> Loss:
        return self.objective(self.model, batch)
