"""One base in memory for several runs: each gets modules of its own over the same weights."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_cli.lora.weights import is_quantised
from lora_cli.models.base import Base
from lora_cli.models.heads import Head, start
from lora_cli.models.load import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LoadModel = Callable[..., "PreTrainedModel"]
BESIDE = ("state", "quant_state")  # what bitsandbytes' layers keep of a weight beside it


def loaded_once(load: LoadModel = load_model) -> LoadModel:
    """A `load_model` that reads a base once, and again only where the next run asks for another one, or in another way.

    A head that is new starts from the seed that is asked for, whoever asked first.
    """
    kept: list[tuple[object, PreTrainedModel]] = []

    def load_shared(base: Base, *, head: Head | None = None, **how: Any) -> "PreTrainedModel":
        asked = (base.folder, head and replace(head, seed=0), how)
        if not kept or kept[0][0] != asked:
            kept.clear()  # before the next one is read
            kept.append((asked, load(base, head=head, **how)))
        model = shared_copy(kept[0][1])
        if head and head.brought is None:
            start(model, [name for name, p in model.named_parameters() if p.requires_grad], head.seed)
        return model

    return load_shared


def shared_copy(model: "PreTrainedModel") -> "PreTrainedModel":
    """The same function by modules of its own: what is wrapped or replaced in one is not in the other.

    Frozen parameters, buffers, and what quantised layers keep beside their weight are the very same objects; what can be
    trained (a new head) is a copy.
    """
    quantised = [module for module in model.modules() if is_quantised(module)]
    beside = [vars(module).get(name) for module in quantised for name in BESIDE]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return copy.deepcopy(model, {id(each): each for each in [*frozen, *model.buffers(), *beside] if each is not None})
