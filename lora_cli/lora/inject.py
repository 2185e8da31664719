"""Putting LoRA layers into a model, finding them again, and switching them off.

A target is the path of a module, or of a parameter that holds the weights of experts; the kind of weight that is found
there decides, through a table, which layer class goes around it.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_cli.errors import ModelError, Problem, RecipeError
from lora_cli.lora.biases import TrainedBias, biased, remove_biases, train_biases, trained_biases
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.convolution import LoRAConvolution
from lora_cli.lora.embedding import LoRAEmbedding
from lora_cli.lora.experts import LoRAExperts
from lora_cli.lora.init import Init, kaiming
from lora_cli.lora.layer import LoRALayer, LoRALinear, LoRAModule
from lora_cli.lora.shards import local
from lora_cli.lora.stand_in import StandIn, stand_ins
from lora_cli.lora.targets import shortest_suffixes
from lora_cli.lora.tokens import TrainedTokens, check_tokens, remove_tokens, train_tokens, trained_tokens
from lora_cli.lora.weights import CONVOLUTION, EMBEDDING, EXPERTS, LINEAR, Weight, keep_unpacked, stored_in, weights_of
from lora_cli.lora.whole import TrainedWhole, whole_modules, wrap_whole

log = logging.getLogger(__name__)

HIGH_RANK = 64
SAMPLED_VALUES = 1024
LAYERS: dict[str, type[LoRAModule]] = {
    LINEAR: LoRALinear,
    EMBEDDING: LoRAEmbedding,
    CONVOLUTION: LoRAConvolution,
}  # experts are several to a module: see `_put_in`


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer that LoRA can wrap, by path, in the model's order."""
    return {path: weight.module for path, weight in weights_of(model).items() if weight.kind == LINEAR}


def names_of_targets(model: nn.Module, paths: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """PEFT's `target_modules` and `target_parameters`: the shortest endings that name exactly the weights at `paths`."""
    modules = [path for path, _ in model.named_modules()]
    parameters = [path for path, weight in weights_of(model).items() if weight.kind == EXPERTS]
    return (
        shortest_suffixes([path for path in paths if path not in parameters], modules),
        shortest_suffixes([path for path in paths if path in parameters], parameters, least=2),
    )


def inject(
    model: nn.Module,
    config: LoRAConfig,
    paths: Sequence[str],
    *,
    whole: Sequence[str] = (),
    init: Init = kaiming,
    given: Callable[[str], Tensor] | None = None,
    seed: int = 0,
) -> dict[str, LoRALayer]:
    """Freeze the model, wrap the modules at `paths`, and train those at `whole` whole; returns the LoRA layers by path.

    Each layer's start is a function of (seed, path), and of what is `given` for the path where the start needs it: the
    same on every process and for any choice of targets.
    """
    layers = wrap(model, config, paths, whole=whole)
    for path in paths:
        try:
            init(layers[path], generator_for(seed, path), *([given(path)] if given else []))
        except ValueError as error:
            raise RecipeError(
                Problem(f"`lora.init` can't start {path}: {error}", fix="change `lora.r`, or use `lora.init: default`")
            ) from error
    _warn_of_ranks(config, layers)
    return layers


def wrap(
    model: nn.Module, config: LoRAConfig, paths: Sequence[str], *, whole: Sequence[str] = ()
) -> dict[str, LoRALayer]:
    """Freeze the model and wrap the modules at `paths` in layers that do nothing yet: A and B are zero."""
    model.requires_grad_(False)
    keep_unpacked(model)
    bases = biased(model, config.bias, paths, whole)
    if config.trainable_tokens:
        check_tokens(model, config.trainable_tokens, [*paths, *whole])
    wrap_whole(model, whole)
    found = weights_of(model)
    if problems := [_no_weight(path, model) for path in paths if path not in found]:
        raise ModelError(*problems)
    for path in paths:
        try:
            _put_in(model, path, found[path], config.at(path))
        except ValueError as error:
            raise ModelError(
                Problem(f"{path} can't get an adapter: {error}", fix="take it out of `lora.targets`")
            ) from error
    train_biases(model, bases)
    if config.trainable_tokens:
        train_tokens(model, config.trainable_tokens)
    return lora_layers(model)


def _put_in(model: nn.Module, path: str, weight: Weight, config: LoRAConfig) -> None:
    if weight.kind == EXPERTS:
        path = path.removesuffix(f".{weight.parameter}")
        if not isinstance(model.get_submodule(path), LoRAExperts):
            model.set_submodule(path, LoRAExperts(weight.module).train(weight.module.training))
        model.get_submodule(path).add(weight, config)
    else:
        model.set_submodule(path, LAYERS[weight.kind](weight, config).train(weight.module.training))


def remove(model: nn.Module) -> None:
    """Take out again all that an adapter put in: the model is the base it was, its weights the very same tensors."""
    remove_biases(model)
    remove_tokens(model)
    for path, module in stand_ins(model).items():
        model.set_submodule(path, module.base)


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The LoRA layers of a model by the path of the weight that they change."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALayer)}


def trained_beside(model: nn.Module) -> dict[str, TrainedWhole | TrainedBias | TrainedTokens]:
    """What is trained beside the LoRA layers, by the path of the module it belongs to."""
    return {**whole_modules(model), **trained_biases(model), **trained_tokens(model)}


def moves_of(module: nn.Module) -> list[Callable[..., Tensor]]:
    """The hooks with which trained biases and rows of tokens move what a module gives: (module, inputs, output) -> output."""
    hooks = module._forward_hooks.values()
    return [hook for hook in hooks if isinstance(getattr(hook, "__self__", None), (TrainedBias, TrainedTokens))]


def changed_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that give something else than the base's do, by path."""
    found = ((path, module) for path, module in model.named_modules() if path)
    return {path: module for path, module in found if isinstance(module, StandIn) or moves_of(module)}


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model, bit for bit: every adapter is switched off inside the block, and what is trained beside it is as it was."""
    layers = [*lora_layers(model).values(), *trained_beside(model).values()]
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
    digest, seen = hashlib.sha256(), set()
    for path, module in model.named_modules():
        if isinstance(module, LoRALayer):
            continue
        for tensor in stored_in(module):
            if not tensor.requires_grad and id(tensor) not in seen:
                seen.add(id(tensor))
                flat = local(tensor.detach()).flatten()
                ends = torch.cat([flat[:SAMPLED_VALUES], flat[-SAMPLED_VALUES:]]).cpu()
                digest.update(path.encode() + ends.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def generator_for(seed: int, *names: object) -> torch.Generator:
    """A CPU generator whose stream depends on the seed and the names alone, never on what was drawn before."""
    return torch.Generator().manual_seed(derived_seed(seed, *names))


def derived_seed(seed: int, *names: object) -> int:
    """A 63-bit seed, hashed from `seed` and `names`: streams for different names don't overlap."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _warn_of_ranks(config: LoRAConfig, layers: dict[str, LoRALayer]) -> None:
    if config.r > HIGH_RANK:
        log.warning(
            "`lora.r` is %d: above %d, more data or more targets usually buy more than more rank", config.r, HIGH_RANK
        )
    narrow = [path for path, layer in layers.items() if layer.r > min(layer.frozen.shape)]
    if narrow:
        log.warning(
            "the rank is above the width of %d layers (%s …): it adds parameters there and nothing else",
            len(narrow),
            narrow[0],
        )


def _no_weight(path: str, model: nn.Module) -> Problem:
    kinds = dict(model.named_modules())
    return Problem(
        f"{path} is a {type(kinds[path]).__name__}" if path in kinds else f"this model has no {path}",
        fix="name linear layers, embeddings, convolutions or weights of experts in `lora.targets`, or use `all-linear`",
    )
