"""A module that takes the place of another one, which it keeps, frozen, as its child `base`."""

from typing import Any

from torch import nn


class StandIn(nn.Module):
    """Never changes or subclasses the module whose place it takes; switched off, it is that module, bit for bit."""

    base: nn.Module

    def __getattr__(self, name: str) -> Any:
        """What a model reads of the module it had (`weight`, `num_embeddings` …), it reads of the frozen original."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


def stand_ins(model: nn.Module) -> dict[str, StandIn]:
    """By the path of the module whose place each takes."""
    return {path: module for path, module in model.named_modules() if isinstance(module, StandIn)}
