"""Putting LoRA layers into a model, finding them again, and switching them off.

A target is a module path; what is found there decides, through a table, which layer class wraps it.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lora_cli.errors import ModelError, Problem, RecipeError
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.init import Init, kaiming
from lora_cli.lora.layer import LoRALinear
from lora_cli.lora.shards import local
from lora_cli.lora.weights import STORAGES, keep_unpacked, storage_of
from lora_cli.lora.whole import whole_modules, wrap_whole

log = logging.getLogger(__name__)

HIGH_RANK = 64
SAMPLED_VALUES = 1024
LAYERS = {storage.class_name: LoRALinear for storage in STORAGES}


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer that LoRA can wrap, by path, in the model's order."""
    return {path: module for path, module in model.named_modules() if storage_of(module) is not None}


def inject(
    model: nn.Module,
    config: LoRAConfig,
    paths: Sequence[str],
    *,
    whole: Sequence[str] = (),
    init: Init = kaiming,
    seed: int = 0,
) -> dict[str, LoRALinear]:
    """Freeze the model, wrap the modules at `paths`, and train those at `whole` whole; returns the LoRA layers by path.

    Each layer's start is a function of (seed, path) alone: the same on every process and for any choice of targets.
    """
    layers = wrap(model, config, paths, whole=whole)
    for path in paths:
        try:
            init(layers[path], generator_for(seed, path))
        except ValueError as error:
            raise RecipeError(
                Problem(f"`lora.init` can't start {path}: {error}", fix="lower `lora.r`, or use `lora.init: default`")
            ) from error
    _warn_of_ranks(config, layers)
    return layers


def wrap(
    model: nn.Module, config: LoRAConfig, paths: Sequence[str], *, whole: Sequence[str] = ()
) -> dict[str, LoRALinear]:
    """Freeze the model and wrap the modules at `paths` in layers that do nothing yet: A and B are zero."""
    model.requires_grad_(False)
    keep_unpacked(model)
    wrap_whole(model, whole)
    for path in paths:
        base = model.get_submodule(path)
        storage = storage_of(base)
        if storage is None:
            raise ModelError(_not_linear(path, base))
        layer = LAYERS[storage.class_name](base, config.at(path))
        layer.train(base.training)
        _put(model, path, layer)
    return lora_layers(model)


def remove(model: nn.Module) -> None:
    """Take out again all that an adapter put in: the model is the base it was, its weights the very same tensors."""
    for path, layer in {**lora_layers(model), **whole_modules(model)}.items():
        _put(model, path, layer.base)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRA layers of a model by the path of the module they wrap."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model, bit for bit: every adapter is switched off inside the block, and modules trained whole are as they were."""
    layers = [*lora_layers(model).values(), *whole_modules(model).values()]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def frozen_digest(model: nn.Module) -> str:
    """A hash over both ends of every parameter of the base, as far as it lies here: equal before and after training.

    An A that is frozen is the adapter's, and comes from a checkpoint where a run is resumed.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and not name.endswith("lora_A"):
            flat = local(parameter.detach()).flatten()
            ends = torch.cat([flat[:SAMPLED_VALUES], flat[-SAMPLED_VALUES:]]).cpu()
            digest.update(name.encode() + ends.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def generator_for(seed: int, *names: object) -> torch.Generator:
    """A CPU generator whose stream depends on the seed and the names alone, never on what was drawn before."""
    return torch.Generator().manual_seed(derived_seed(seed, *names))


def derived_seed(seed: int, *names: object) -> int:
    """A 63-bit seed, hashed from `seed` and `names`: streams for different names don't overlap."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _warn_of_ranks(config: LoRAConfig, layers: dict[str, LoRALinear]) -> None:
    if config.r > HIGH_RANK:
        log.warning(
            "`lora.r` is %d: above %d, more data or more targets usually buy more than more rank", config.r, HIGH_RANK
        )
    narrow = [
        path for path, layer in layers.items() if len(layer.lora_A) > min(layer.lora_A.shape[1], len(layer.lora_B))
    ]
    if narrow:
        log.warning(
            "the rank is above the width of %d layers (%s …): it adds parameters there and nothing else",
            len(narrow),
            narrow[0],
        )


def _not_linear(path: str, module: nn.Module) -> Problem:
    return Problem(
        f"{path} is a {type(module).__name__}; an adapter can change {', '.join(LAYERS)}",
        fix="name linear layers in `lora.targets`, or use `all-linear`",
    )
