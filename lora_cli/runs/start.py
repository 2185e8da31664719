"""`lora.start_from`: a new run that begins at the factors of an adapter, with an optimizer that knows nothing of it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from lora_cli.errors import ModelError, Problem
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.base_files import fingerprint
from lora_cli.lora.completion import load_for
from lora_cli.lora.config import LoRAConfig, of_expert
from lora_cli.lora.inject import lora_layers, trained_beside
from lora_cli.models.identity import check_tokenizer
from lora_cli.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


OTHER_BASE = "set `model.base` to the base that it was trained on, or `lora.start_from` to an adapter of this one"


def start_of(recipe: Recipe, base: Path, tokenizer: "PreTrainedTokenizerBase | None" = None) -> Adapter:
    """The adapter that `lora.start_from` names, on its own base and tokenizer; a base without weights yet fits all.

    Raises ModelError where one of them is another than it was trained with.
    """
    adapter = load_for(Path(recipe.lora.start_from), recipe.model.quantize, alive=False)
    if tokenizer is not None:
        check_tokenizer(adapter, tokenizer, base, fix=OTHER_BASE)
    if any(base.glob("*.safetensors")):
        adapter.check_base(fingerprint(base), base, fix=OTHER_BASE)
    return adapter


def start_from(recipe: Recipe, model: nn.Module, config: LoRAConfig, base: Path, labels: Sequence[str] = ()) -> None:
    """Copy an adapter's factors into LoRA layers that are in place.

    Raises ModelError where the adapter is of another base, or its layers, ranks or scales are not those of the recipe.
    """
    adapter = start_of(recipe, base)
    if problems := list(_misfits(adapter, model, config, tuple(labels), recipe.lora.start_from)):
        raise ModelError(*problems)
    adapter.copy_into(model)


def _misfits(
    adapter: Adapter, model: nn.Module, config: LoRAConfig, labels: tuple[str, ...], where: str
) -> Iterator[Problem]:
    """What tells the adapter's shape from the recipe's, each with the key that mends it."""
    ours, theirs = set(lora_layers(model)), {of_expert(path)[0] for path in adapter.layers}
    what = "`lora.start_from` names an adapter"
    if other := sorted(theirs ^ ours):
        who = "it changes" if other[0] in theirs else "it does not change"
        fix = "set `lora.targets` to what it was trained with"
        yield Problem(f"{what} of other modules: {who} {other[0]}", where=where, fix=fix)
        return
    if adapter.labels != labels:
        theirs_, ours_ = (", ".join(found) or "none" for found in (adapter.labels, labels))
        fix = "set `training.objective` to what it was trained with"
        yield Problem(f"{what} with the labels {theirs_}, where the rows have {ours_}", where=where, fix=fix)
        return
    if adapter.config.bias != config.bias:
        yield Problem(
            f"{what} with `bias: {adapter.config.bias}`", where=where, fix=f"set `lora.bias: {adapter.config.bias}`"
        )
        return
    if adapter.config.trainable_tokens != config.trainable_tokens:
        fix = "set `lora.trainable_tokens` to what it was trained with"
        yield Problem(f"{what} that trains the rows of other tokens", where=where, fix=fix)
        return
    beside = trained_beside(model)
    if set(beside) != set(adapter.extras):
        trained = ", ".join(adapter.whole) or "nothing"
        fix = "set `lora.modules_to_save` to what it was trained with"
        yield Problem(f"{what} that trains {trained} whole", where=where, fix=fix)
        return
    yield from adapter.misfits_of_extras({path: module.base for path, module in beside.items()})
    if adapter.config.use_dora != config.use_dora:
        had = str(adapter.config.use_dora).lower()
        yield Problem(f"{what} with `use_dora: {had}`", where=where, fix=f"set `lora.use_dora: {had}`")
    for path in sorted(ours):
        mine, its = config.at(path), adapter.config.at(path)
        if mine.r != its.r:
            fix = f"set `lora.r: {its.r}`"
            yield Problem(f"{what} of rank {its.r} at {path}, where the recipe has {mine.r}", where=where, fix=fix)
            return
        if mine.scale != its.scale:
            fix = f"set `lora.alpha: {its.lora_alpha:g}` and `lora.use_rslora: {str(its.use_rslora).lower()}`"
            yield Problem(
                f"{what} of scale {its.scale:g} at {path}, where the recipe has {mine.scale:g}", where=where, fix=fix
            )
            return
