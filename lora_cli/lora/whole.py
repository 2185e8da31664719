"""A module that is trained whole beside the LoRA layers: a new head, the embeddings, norms. PEFT's `modules_to_save`.

    y = base(x) with the trained parameters in the place of its own, in the number format of the base

The frozen original stays, so that the base's own function is still there; what is trained is a float32 copy of it.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_cli.errors import ModelError, Problem
from lora_cli.lora.shards import gathered, put
from lora_cli.lora.stand_in import StandIn
from lora_cli.lora.weights import is_quantised

State = Mapping[str, Tensor]  # parameter name inside the module -> tensor


class TrainedWhole(StandIn):
    """Takes the place of a module of any kind; never changes or subclasses it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.enabled = True
        self.trained = copy.deepcopy(base).float().requires_grad_(True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.enabled:
            return self.base(*args, **kwargs)
        own = dict(self.base.named_parameters())
        used = {name: trained.to(own[name].dtype) for name, trained in self.trained.named_parameters()}
        return functional_call(self.base, used, args, kwargs)

    def state(self) -> dict[str, Tensor]:
        """A copy of what is trained: float32, on the CPU."""
        parameters = self.trained.named_parameters()
        return {name: gathered(p.detach()).to("cpu", torch.float32, copy=True) for name, p in parameters}

    def load(self, state: State) -> None:
        with torch.no_grad():
            for name, parameter in self.trained.named_parameters():
                put(parameter, state[name])


def whole_modules(model: nn.Module) -> dict[str, TrainedWhole]:
    """The modules trained whole, by the path of the module whose place they take."""
    return {path: module for path, module in model.named_modules() if isinstance(module, TrainedWhole)}


def wrap_whole(model: nn.Module, paths: Sequence[str]) -> None:
    """Put a TrainedWhole in the place of each module. Raises ModelError for a module that cannot be trained so."""
    check_whole(model, paths)
    for path in paths:
        base = model.get_submodule(path)
        model.set_submodule(path, TrainedWhole(base).train(base.training))


def check_whole(model: nn.Module, paths: Sequence[str]) -> None:
    """Raise ModelError for quantised modules, and for those that share a weight with a module that stays frozen."""
    problems = []
    for path in paths:
        module = model.get_submodule(path)
        if any(is_quantised(inner) for inner in module.modules()):
            what = f"{path} is quantised, and whole numbers can't be trained"
            problems.append(Problem(what, fix="take it out of `lora.modules_to_save`, or set `model.quantize: none`"))
        elif partner := _shares_with(model, path, paths):
            what = f"{path} is tied to {partner}: one weight, of which a copy would be trained and the other stay"
            fix = f"name {partner} in `lora.modules_to_save` too, and each is trained for itself; or take {path} out"
            problems.append(Problem(what, fix=fix))
    if problems:
        raise ModelError(*problems)


def _shares_with(model: nn.Module, path: str, trained: Sequence[str]) -> str | None:
    """The module outside of the one at `path` that has a parameter of it too, and is not trained whole itself."""
    own = {id(parameter) for parameter in model.get_submodule(path).parameters()}
    everywhere = model.named_parameters(remove_duplicate=False)
    inside = tuple(f"{each}." for each in (path, *trained))
    outside = (name for name, p in everywhere if id(p) in own and not name.startswith(inside))
    return next((name.rpartition(".")[0] for name in outside), None)
