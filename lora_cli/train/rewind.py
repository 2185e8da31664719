"""Rewinding: weights and optimizer as they were some steps ago, kept in memory for when the gradient explodes.

The run goes on with the rows that come next: those that led to the explosion, and those behind the snapshot, are not
taken again (as in PaLM, Chowdhery et al. 2022, section 5.1).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from lora_cli.lora.shards import gathered, put
from lora_cli.train.optim import Parameters, optimizer_state, restore_optimizer

EVERY = 20  # steps between snapshots


@dataclass(frozen=True)
class Snapshot:
    """The state behind `step`: trained parameters by name, and the optimizer's as `optimizer_state` gives it."""

    step: int
    weights: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, dict]


class Rewind:
    """Holds the latest snapshot; a checkpoint keeps it, so that a resumed run would go back to the same one."""

    def __init__(self, snapshot: Snapshot | None = None) -> None:
        self.snapshot = snapshot

    def note(self, step: int, parameters: Parameters, optimizer: Optimizer) -> None:
        """Take a snapshot where one is due."""
        if step % EVERY == 0:
            weights = {
                name: gathered(parameter.detach()).to("cpu", copy=True) for name, parameter in parameters.items()
            }
            self.snapshot = Snapshot(step, weights, *optimizer_state(optimizer, parameters))

    def put_back(self, parameters: Parameters, optimizer: Optimizer) -> int | None:
        """The step that the weights are those of now; None where there is no snapshot yet, and nothing changes."""
        if self.snapshot is None:
            return None
        with torch.no_grad():
            for name, parameter in parameters.items():
                put(parameter, self.snapshot.weights[name])
        tensors = {name: tensor.clone() for name, tensor in self.snapshot.tensors.items()}
        restore_optimizer(optimizer, parameters, tensors, self.snapshot.scalars)
        return self.snapshot.step
