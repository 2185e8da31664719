"""Biases that are trained beside the LoRA layers: PEFT's `bias: all` and `lora_only`.

    y = module(x) + (b′ − b)        b: the frozen bias of the base,  b′: the trained one, a float32 copy of it at the start

The base's own parameter is never written, so that its function is still there: switched off, or taken out again, an
adapter leaves nothing behind. (PEFT trains the base's biases in place, and warns that they stay when it is switched off.)
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_cli.errors import ModelError, Problem
from lora_cli.lora.shards import gathered, put
from lora_cli.lora.weights import CONVOLUTION, storage_of

NAME = "trained_bias"
NONE, ALL, LORA_ONLY = "none", "all", "lora_only"


class TrainedBias(nn.Module):
    """A bias's trained form: a child of the module it belongs to, or that stands in for it, whose output it moves."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.enabled = True
        self.bias = nn.Parameter(base.bias.detach().float().clone())
        self._base = (base,)  # in a tuple, so that it is no child
        storage = storage_of(base)
        self.trailing = len(base.kernel_size) if storage and storage.kind == CONVOLUTION else 0

    @property
    def base(self) -> nn.Module:
        """The module with the frozen bias."""
        return self._base[0]

    def move(self, module: nn.Module, inputs: object, y: Tensor) -> Tensor:
        """As a forward hook: y [..., out, …] with the trained bias in the place of the frozen one."""
        if not self.enabled:
            return y
        moved = gathered(self.bias) - gathered(self.base.bias).float()
        return y + moved.to(y.dtype).view(-1, *(1,) * self.trailing)

    def state(self) -> dict[str, Tensor]:
        """A copy of what is trained: float32, on the CPU."""
        return {"bias": gathered(self.bias.detach()).to("cpu", torch.float32, copy=True)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            put(self.bias, state["bias"])


def biased(model: nn.Module, bias: str, paths: Sequence[str], whole: Collection[str] = ()) -> dict[str, nn.Module]:
    """The modules of a bare base whose biases are trained, by path: those at `paths`, or all but those trained whole.

    Raises ModelError where there are none, and for biases that are not just added to what their module gives.
    """
    if bias == NONE:
        return {}
    inside = tuple(f"{path}." for path in whole)
    found = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module._parameters.get("bias"), Tensor)
        and (path in paths if bias == LORA_ONLY else not f"{path}.".startswith(inside or "."))
    }
    if not found:
        who = "the adapted modules have" if bias == LORA_ONLY else "this model has"
        raise ModelError(Problem(f"`lora.bias: {bias}`: {who} no bias", fix="leave `lora.bias` out"))
    ids = [id(module.bias) for module in found.values()]
    for path, module in found.items():
        if not _is_added(module) or ids.count(id(module.bias)) > 1:
            what = f"`lora.bias: {bias}` trains what is added to a module's output, and the bias of {path} is not"
            raise ModelError(
                Problem(what, fix="use `lora.bias: lora_only`, or name the module in `lora.modules_to_save`")
            )
    return found


def train_biases(model: nn.Module, bases: Mapping[str, nn.Module]) -> None:
    """Train the biases of these modules, which may stand inside of LoRA layers by now."""
    for path, base in bases.items():
        owner = model.get_submodule(path)
        trained = TrainedBias(base).train(base.training)
        owner.add_module(NAME, trained)
        owner.register_forward_hook(trained.move)


def trained_biases(model: nn.Module) -> dict[str, TrainedBias]:
    """By the path of the module that they belong to."""
    found = ((path, module) for path, module in model.named_modules() if isinstance(module, TrainedBias))
    return {path.removesuffix(f".{NAME}"): module for path, module in found}


def remove_biases(model: nn.Module) -> None:
    """Every module is what it was."""
    for path, trained in trained_biases(model).items():
        owner = model.get_submodule(path)
        for number in [number for number, hook in owner._forward_hooks.items() if hook == trained.move]:
            del owner._forward_hooks[number]
        delattr(owner, NAME)


def _is_added(module: nn.Module) -> bool:
    return storage_of(module) is not None or "Norm" in type(module).__name__
