"""Which tensor of a base's files is the weight of which module: names on disk differ from the model's own.

    h.0.attn.c_attn.weight  ->  transformer.h.0.attn.c_attn       (GPT-2 on the hub was saved without its head)
    model.embed_tokens.weight  ->  lm_head                        (tied: one tensor for two modules)

transformers' own loading rules translate, so what is found here is what `from_pretrained` will load.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.errors import ModelError, Problem
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.base_files import StoredTensor, stored_tensors
from lora_cli.lora.inject import linears
from lora_cli.lora.weights import storage_of
from lora_cli.models.heads import head_of, may_be_new
from lora_cli.models.load import skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class Place:
    """Where a module's weight stands in the files.

    `tensor` is read; the new weight is written as `updated`. A weight tied to another module's is written beside the
    other's, which stays under the name `kept`.
    """

    path: str
    tensor: str
    transposed: bool  # the files hold [in, out]
    updated: str
    kept: str | None = None
    tied: bool = False


def places(folder: Path, adapter: Adapter) -> dict[str, Place]:
    """The place of each module that the adapter changes. Raises ModelError for what has none, or another shape."""
    head = head_of(adapter)
    model = skeleton(folder, head)
    adapter.check_fits(model)
    stored = stored_tensors(folder)
    names = names_in_files(model, stored)
    problems, found = [], {}
    for path in adapter.layers:
        transposed = storage_of(linears(model)[path]).transposed
        place = place_of(model, f"{path}.weight", names, transposed=transposed, own_names=head is not None)
        if place is None or (problem := _misfit(adapter, place, stored[place.tensor])):
            problems.append(_missing(path, folder) if place is None else problem)
        else:
            found[path] = place
    if problems:
        raise ModelError(*problems[:3])
    return found


@dataclass(frozen=True)
class Others:
    """What a merge does beside the LoRA layers.

    `placed` are the parameters trained whole that the files have, by name; `new` those that they have not. Of a
    classifier, `renamed` gives every other tensor its name in the model, and `left_out` are those of another head.
    """

    placed: Mapping[str, Place]
    new: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def others(folder: Path, adapter: Adapter) -> Others:
    """Raises ModelError where something trained whole has no place in the files, and is no head that may be new."""
    head = head_of(adapter)
    if not adapter.extras:
        return Others({})
    model, stored = skeleton(folder, head), stored_tensors(folder)
    names = names_in_files(model, stored)
    wanted = [f"{path}.{name}" for path, state in adapter.extras.items() for name in state]
    found = {name: place_of(model, name, names, transposed=False, own_names=head is not None) for name in wanted}
    shapes = {f"{path}.{name}": tuple(t.shape) for path, state in adapter.extras.items() for name, t in state.items()}
    fits = {name: place for name, place in found.items() if place and stored[place.tensor].shape == shapes[name]}
    new = tuple(name for name in wanted if name not in fits and head is not None and may_be_new(model, name))
    if lost := [name for name in wanted if name not in fits and name not in new]:
        raise ModelError(_missing(lost[0].rpartition(".")[0], folder))
    if head is None:
        return Others(fits)
    loaded = {file: name for name, file in names.items()}
    known = {*loaded, *_converted(model, stored)}
    renamed = {file: name for file, name in loaded.items() if name != file and name not in new}
    left_out = [file for file in stored if file not in known or loaded.get(file) in new]
    return Others(fits, new, renamed, tuple(left_out))


def _converted(model: "PreTrainedModel", stored: Iterable[str]) -> set[str]:
    """The names of the tensors that become part of another one as the model is loaded."""
    return {name for name, _, converted in _loaded_as(model, stored) if converted}


def names_in_files(model: "PreTrainedModel", stored: Iterable[str]) -> dict[str, str]:
    """Parameter name -> name in the files, for every tensor that is loaded as it is (experts are fused on the way)."""
    known = model.state_dict()
    return {
        renamed: name for name, renamed, converted in _loaded_as(model, stored) if renamed in known and not converted
    }


def _loaded_as(model: "PreTrainedModel", stored: Iterable[str]) -> Iterator[tuple[str, str, bool]]:
    """(name in the files, name in the model, whether it is converted on the way)"""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    known = model.state_dict()
    for name in stored:
        renamed, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if renamed not in known and name in known:
            renamed, converter = name, None
        yield name, renamed, converter is not None


def place_of(
    model: "PreTrainedModel", own: str, names: Mapping[str, str], *, transposed: bool, own_names: bool
) -> Place | None:
    """The place of the parameter `own`; None where the files hold it not as one tensor. `names` are `names_in_files`.

    With `own_names`, the new one is written under its name in the model.
    """
    path = own.rpartition(".")[0]
    partners = [name for name in _tied_with(model, own) if name in names]
    absent = [name for name in _tied_with(model, own) if name not in names]
    tied = bool(partners or absent)
    if own in names:
        kept = absent[0] if absent and not partners else None
        return Place(path, names[own], transposed, own if own_names else names[own], kept, tied)
    if partners:
        tensor = names[partners[0]]
        return Place(path, tensor, transposed, own, tensor, tied)
    return None


def _tied_with(model: "PreTrainedModel", own: str) -> list[str]:
    """The other parameters that share the weight `own` when the model is loaded."""
    ties = model.all_tied_weights_keys
    source = ties.get(own, own)
    group = [source, *(target for target, of in ties.items() if of == source)]
    return [name for name in group if name != own] if len(group) > 1 else []


def _misfit(adapter: Adapter, place: Place, stored: StoredTensor) -> Problem | None:
    factors = adapter.layers[place.path]
    shape = (factors.B.shape[0], factors.A.shape[1])
    if stored.dtype not in FLOATS:
        return Problem(
            f"the base is quantised on disk: {place.tensor} is stored as {stored.dtype}",
            where=str(stored.file),
            fix="give the original 16-bit model as `--base`: merging into few bits would lose most of the update",
        )
    if stored.shape != (shape[::-1] if place.transposed else shape):
        return Problem(
            f"{place.tensor} is {list(stored.shape)} in the files, and the adapter changes a weight of {list(shape)}",
            where=str(stored.file),
            fix="give the base it was trained on with `--base`",
        )
    return None


def _missing(path: str, folder: Path) -> Problem:
    return Problem(
        f"the files hold no weight for {path} as one tensor",
        where=str(folder),
        fix="give the original 16-bit model as `--base`; a quantised or converted one can't be merged into",
    )
