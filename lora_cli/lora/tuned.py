"""Full fine-tuning, for comparison: every weight of a model is trained, and what is learned is not an adapter but all of them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lora_cli.errors import DivergedError, Problem
from lora_cli.lora.shards import put

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Tuned:
    """The weights by the name of their parameter, float32, on the CPU; tied ones stand once."""

    weights: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> "Tuned":
        """A copy of what the model holds."""
        return cls({name: p.detach().to("cpu", torch.float32, copy=True) for name, p in model.named_parameters()})

    @classmethod
    def load(cls, folder: Path) -> "Tuned":
        """From a checkpoint."""
        return cls(load_file(folder / WEIGHTS))

    def files(self) -> dict[str, bytes]:
        """Of a checkpoint."""
        return {WEIGHTS: save({name: tensor.contiguous() for name, tensor in self.weights.items()}, {"format": "pt"})}

    def copy_into(self, model: nn.Module) -> None:
        """Overwrite the model's parameters, which have these names and shapes."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                put(parameter, self.weights[name])

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.weights.values())

    def digest(self) -> str:
        """SHA-256 of names, shapes and values."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.weights.items()):
            found.update(repr((name, tuple(tensor.shape))).encode())
            found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        return found.hexdigest()

    def check_finite(self, where: str = "") -> None:
        """Raise DivergedError when a value is not finite."""
        broken = [name for name, tensor in self.weights.items() if not tensor.isfinite().all()]
        if broken:
            what = f"{len(broken)} weights hold values that are not finite, first {broken[0]}"
            fix = "train again from an earlier checkpoint, with a lower `training.learning_rate`"
            raise DivergedError(Problem(what, where=where, fix=fix))
