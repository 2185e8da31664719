"""Gradient checkpointing: what is computed again in the backward pass instead of being kept from the forward.

`0` nothing, `mlp` the MLP of every block, `k` the blocks 0, k, 2k …, and so `1` every block. It trades time for memory and
changes no loss and no gradient. No torch is imported before a model is there, so that a plan can name the choices.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_cli.errors import ModelError, Problem

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

MLP = "mlp"
Recompute = int | str
NOTHING, EVERY_BLOCK = 0, 1


def recompute_of(setting: str | bool | int) -> Recompute | None:
    """What `training.gradient_checkpointing` asks for; None for `auto`."""
    if setting == "auto":
        return None
    return setting if isinstance(setting, str) else int(setting)


def setting_of(recompute: Recompute) -> str | bool | int:
    """As a recipe writes it."""
    return bool(recompute) if recompute in (NOTHING, EVERY_BLOCK) else recompute


def is_recomputed(block: int, recompute: Recompute) -> bool:
    """Whether the block of this number is computed again as a whole."""
    return isinstance(recompute, int) and recompute > 0 and block % recompute == 0


def described(recompute: Recompute) -> str:
    """`none`, `MLPs`, `every block`, `every 3rd block`."""
    if isinstance(recompute, str):
        return "MLPs"
    words = {NOTHING: "none", EVERY_BLOCK: "every block", 2: "every 2nd block", 3: "every 3rd block"}
    return words.get(recompute, f"every {recompute}th block")


def checkpoint_activations(model: "PreTrainedModel", recompute: Recompute) -> None:
    """Have the model's blocks, or their MLPs, compute their forward again, and nothing else; works over a frozen base.

    Raises ModelError for `mlp` where blocks have no module of that kind.
    """
    for module in model.modules():
        if isinstance(module, _Recomputed):
            module.__class__ = type(module).__bases__[1]
    for module in _recomputed_modules(model, recompute):
        _recompute(module)


def blocks_of(model: "PreTrainedModel") -> list["nn.Module"]:
    """The blocks of the language model, in their order."""
    from torch import nn

    decoder = model.get_decoder() or model
    return list(next(module for module in decoder.modules() if isinstance(module, nn.ModuleList)))


def _recomputed_modules(model: "PreTrainedModel", recompute: Recompute) -> Iterator["nn.Module"]:
    for i, block in enumerate(blocks_of(model)):
        if recompute == MLP:
            yield _mlp(block)
        elif is_recomputed(i, recompute):
            yield block


def _mlp(block: "nn.Module") -> "nn.Module":
    found = dict(block.named_children()).get(MLP)
    if found is None:
        what = f"`training.gradient_checkpointing: mlp` needs blocks with an MLP, and {type(block).__name__} has none"
        raise ModelError(Problem(what, fix="set `training.gradient_checkpointing: true`, or 2 for every second block"))
    return found


def _recompute(module: "nn.Module") -> None:
    """Give one module a class of its own, as torch's fully_shard does: its name, children and parameters stay what they are."""
    module.__class__ = type(f"Recomputed{type(module).__name__}", (_Recomputed, type(module)), {})


class _Recomputed:
    """In training, the forward keeps its inputs alone. Hooks, such as those that gather shards, stay outside of it."""

    def forward(self, *args, **kwargs):
        import torch
        from torch.utils.checkpoint import checkpoint

        if self.training and torch.is_grad_enabled():
            return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)
        return super().forward(*args, **kwargs)
