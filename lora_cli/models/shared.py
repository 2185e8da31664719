"""One base in memory for several runs: each gets modules of its own over the same weights."""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lora_cli.lora.weights import storage_of
from lora_cli.models.base import Base
from lora_cli.models.load import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LoadModel = Callable[..., "PreTrainedModel"]


def loaded_once(load: LoadModel = load_model) -> LoadModel:
    """A `load_model` that reads a base once, and again only where the next run asks for another one, or in another way."""
    kept: list[tuple[object, PreTrainedModel]] = []

    def load_shared(base: Base, **how: Any) -> "PreTrainedModel":
        asked = (base.folder, how)
        if not kept or kept[0][0] != asked:
            kept.clear()  # before the next one is read
            kept.append((asked, load(base, **how)))
        return shared_copy(kept[0][1])

    return load_shared


def shared_copy(model: "PreTrainedModel") -> "PreTrainedModel":
    """The same function by modules of its own: what is wrapped or replaced in one is not in the other.

    Parameters, buffers and whole linear layers (quantised ones keep state beside their weight) are the very same objects.
    """
    same = [*model.parameters(), *model.buffers(), *(m for m in model.modules() if storage_of(m) is not None)]
    return copy.deepcopy(model, {id(each): each for each in same})
