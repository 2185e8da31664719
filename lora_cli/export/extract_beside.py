"""What a fine-tune changed beside the weights that get an adapter, as an adapter holds it: as it is, and not as low rank.

modules          whole, as `lora.modules_to_save` trains them: norms, embeddings, a head
biases           as `lora.bias` trains them
rows of tokens   that the base has none for: without them the tuned tokenizer's new tokens would have no embedding
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_cli.errors import ModelError, Problem
from lora_cli.export.names import parameters_of
from lora_cli.lora.beside import Beside
from lora_cli.lora.biases import NONE, biased
from lora_cli.lora.targets import choose_whole, names_to_save
from lora_cli.lora.tokens import ROWS, tables
from lora_cli.lora.vocabulary import of_vocabulary
from lora_cli.lora.whole import State, check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Read = Callable[[str], Tensor | None]


@dataclass(frozen=True)
class Kept:
    """What is to be held as it is: names of modules, and which biases (`LoRAConfig.bias`)."""

    modules_to_save: Sequence[str] = ()
    bias: str = NONE


def whole_paths(model: "PreTrainedModel", kept: Kept) -> list[str]:
    """The modules that are held whole. Raises ModelError for a name without any, and for one that can't be trained so."""
    if not kept.modules_to_save:
        return []
    modules = [path for path, module in model.named_modules() if path and next(module.parameters(), None) is not None]
    paths = choose_whole(kept.modules_to_save, modules)
    check_whole(model, paths)
    return paths


def held_beside(
    before: "PreTrainedModel",
    after: "PreTrainedModel",
    folders: tuple[Path, Path],
    kept: Kept,
    *,
    whole: Sequence[str],
    adapted: Collection[str],
    known_tokens: int | None,
) -> Beside:
    """Of the modules at `whole` those that have changed, the biases asked for, and the rows of tokens that are new.

    The models are base and tuned, without weights, and `folders` theirs; `known_tokens` is how many the tuned tokenizer
    has, where there is one: rows behind them are of no token.
    """
    own, theirs = map(parameters_of, folders)
    states = {path: _state(before, path, theirs) for path in whole}
    changed = [path for path, state in states.items() if _differs(path, state, own)]
    extras = {path: states[path] for path in changed}
    for path in biased(before, kept.bias, list(adapted), changed):
        extras[path] = {"bias": _of_one_shape(before, f"{path}.bias", theirs)}
    tokens = _new_tokens(before, after, known_tokens)
    if tokens:
        extras |= {path: {ROWS: theirs(f"{path}.weight")[list(tokens)].float()} for path in tables(before)}
    names = names_to_save(changed, [path for path, _ in before.named_modules()])
    return Beside(extras, modules_to_save=names, bias=kept.bias, trainable_tokens=tokens)


def held_whole(beside: Beside) -> set[str]:
    """The names of the parameters that are in it, but for rows."""
    return {f"{path}.{name}" for path, state in beside.extras.items() for name in state if name != ROWS}


def rows_of_tokens(before: "PreTrainedModel", after: "PreTrainedModel") -> set[str]:
    """The parameters of both models that have a row for each token: those that both have are compared, whatever their numbers."""
    if tables(before).keys() != tables(after).keys():
        return set()
    modules = of_vocabulary(before).items()
    return {f"{path}.{name}" for path, module in modules for name, _ in module.named_parameters(recurse=False)}


def _state(model: "PreTrainedModel", path: str, theirs: Read) -> State:
    names = [name for name, _ in model.get_submodule(path).named_parameters()]
    return {name: _of_one_shape(model, f"{path}.{name}", theirs) for name in names}


def _of_one_shape(model: "PreTrainedModel", parameter: str, theirs: Read) -> Tensor:
    """float32. Raises ModelError for one that the tuned model lacks, or has in another shape than the base."""
    found, shape = theirs(parameter), model.get_parameter(parameter).shape
    if found is not None and found.shape == shape:
        return found.float()
    has = "lacks it" if found is None else f"has {list(found.shape)}"
    what = f"{parameter} is {list(shape)} in the base, and the tuned model {has}"
    raise ModelError(
        Problem(what, fix="leave its module out of `--modules-to-save`; rows of new tokens are held anyway")
    )


def _differs(path: str, state: State, own: Read) -> bool:
    before = {name: own(f"{path}.{name}") for name in state}
    return any(before[name] is None or not torch.equal(before[name].float(), state[name]) for name in state)


def _new_tokens(before: "PreTrainedModel", after: "PreTrainedModel", known: int | None) -> tuple[int, ...]:
    """The tokens of the tuned model for which the base's tables have no row; none where the two have other tables."""
    rows, found = ({path: len(table.weight) for path, table in tables(model).items()} for model in (before, after))
    if rows.keys() != found.keys() or len(set(found.values())) != 1:
        return ()
    return tuple(range(min(rows.values()), min(known or inf, *found.values())))
