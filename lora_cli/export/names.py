"""Which tensor of a base's files is the weight of which module: names on disk differ from the model's own.

    h.0.attn.c_attn.weight  ->  transformer.h.0.attn.c_attn       (GPT-2 on the hub was saved without its head)
    model.embed_tokens.weight  ->  lm_head                        (tied: one tensor for two modules)
    mlp.experts.7.gate_proj.weight  ->  rows of expert 7 of mlp.experts.gate_up_proj

transformers' own loading rules translate, so what is found here is what `from_pretrained` will load.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_cli.errors import ModelError, Problem
from lora_cli.export.files import read_weight
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.base_files import StoredTensor, stored_tensors
from lora_cli.lora.config import of_expert
from lora_cli.lora.tokens import ROWS
from lora_cli.lora.vocabulary import of_vocabulary
from lora_cli.lora.weights import Weight, weights_of
from lora_cli.models.heads import Head, head_of, may_be_new
from lora_cli.models.load import skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What transformers does with the tensors of experts: one on the other, and what leads into an expert side by side
STACKED = ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class Place:
    """Where a module's weight stands in the files.

    `tensor` is read; the new weight is written as `updated`. A weight tied to another module's is written beside the
    other's, which stays under the name `kept`. Of a weight that is several tensors this is one, with some `rows` of it;
    of a tensor that is the weights of several experts it is the `number`th.
    """

    path: str
    tensor: str
    transposed: bool  # the files hold [in, out]
    updated: str
    kept: str | None = None
    tied: bool = False
    rows: slice = field(default_factory=lambda: slice(None))
    number: int | None = None


Parts = tuple[Place, ...]
"""The places of one weight, in the order of its rows."""


def places(folder: Path, adapter: Adapter) -> dict[str, Parts]:
    """The places of each weight that the adapter changes. Raises ModelError for what has none, or another shape."""
    head = head_of(adapter)
    model = skeleton(folder, head)
    adapter.check_fits(model)
    stored = stored_tensors(folder)
    files = Files.of(model, stored)
    problems, found = [], {}
    for path in adapter.layers:
        parts = files.parts_of(path, own_names=head is not None)
        if problem := _misfit(adapter, path, parts, stored) if parts else _missing(path, folder):
            problems.append(problem)
        else:
            found[path] = parts
    if problems:
        raise ModelError(*problems[:3])
    return found


@dataclass(frozen=True)
class Files:
    """Which tensors of a folder become which weights of a model: `names` as they are, `experts` on the way."""

    model: "PreTrainedModel"
    weights: Mapping[str, Weight]
    stored: Mapping[str, StoredTensor]
    names: Mapping[str, str]
    experts: Mapping[str, list[list[str]]]

    @classmethod
    def of(cls, model: "PreTrainedModel", stored: Mapping[str, StoredTensor]) -> "Files":
        return cls(model, weights_of(model), stored, names_in_files(model, stored), _experts_in_files(model, stored))

    def parts_of(self, path: str, *, own_names: bool = False) -> Parts:
        """The places of the weight at `path`; none where the files hold it in a form that is not known here."""
        parameter, expert = of_expert(path)
        weight = self.weights[parameter]
        if expert is None:
            name = f"{path}.{weight.parameter}"
            place = place_of(self.model, name, self.names, transposed=weight.transposed, own_names=own_names)
            return (place,) if place else ()
        if parameter in self.names:
            tensor = self.names[parameter]
            return (Place(path, tensor, weight.transposed, parameter if own_names else tensor, number=expert),)
        parts, first = [], 0
        for tensor in (names[expert] for names in self.experts.get(parameter, ()) if expert < len(names)):
            last = first + self.stored[tensor].shape[0]
            parts.append(Place(path, tensor, False, tensor, rows=slice(first, last)))
            first = last
        return tuple(parts)

    def read(self, parts: Parts) -> Tensor:
        """[out, in] float32, one weight."""
        return read_parts(self.stored, parts)


def read_parts(stored: Mapping[str, StoredTensor], parts: Parts) -> Tensor:
    """[out, in] float32: the weight that stands in these places."""
    return torch.cat([matrix_at(read_weight(stored[p.tensor], transposed=p.transposed), p).float() for p in parts])


def matrix_at(tensor: Tensor, part: Place) -> Tensor:
    """[rows, in]: the part itself, a view of the tensor that holds it, which is [out, in] or [experts, out, in]."""
    return (tensor if part.number is None else tensor[part.number]).flatten(1)


@dataclass(frozen=True)
class Table:
    """A tensor with a row for each token that a merge changes: it gets the trained rows of the table at `path`, where one
    is named, and has so many `rows` afterwards, where they are more than before."""

    tensor: str
    path: str | None
    rows: int | None


def tables_in_files(folder: Path, adapter: Adapter) -> list[Table]:
    """The tables of which tokens' rows are trained, and what else gets longer with them: a head, its bias.

    Raises ModelError for a table that the files lack.
    """
    if not adapter.tables:
        return []
    model, stored = skeleton(folder, head_of(adapter)), stored_tensors(folder)
    names, found = names_in_files(model, stored), []
    trained = {id(model.get_submodule(path).weight): path for path in adapter.tables}
    parameters = {
        f"{path}.{name}": parameter
        for path, module in of_vocabulary(model).items()
        for name, parameter in module.named_parameters(recurse=False)
    }
    for own in parameters.keys() & names.keys():
        path, here = trained.get(id(parameters[own])), stored[names[own]].shape[0]
        rows = adapter.vocabulary if adapter.vocabulary > here else None
        if path or rows:
            found.append(Table(names[own], path, rows))
    if lost := set(adapter.tables) - {table.path for table in found}:
        raise ModelError(_missing(min(lost), folder))
    return found


def weights_of_base(folder: Path, adapters: Iterable[Adapter]) -> Callable[[str], Tensor]:
    """(path) -> the base's own weight there [out, in], float32, wherever one of the adapters changes it.

    Raises ModelError for an adapter that does not fit the base.
    """
    where = {path: parts for adapter in adapters for path, parts in places(folder, adapter).items()}
    stored = stored_tensors(folder)
    return lambda path: read_parts(stored, where[path])


def parameters_of(folder: Path, head: Head | None = None) -> Callable[[str], Tensor | None]:
    """(parameter) -> the base's own as it is stored; None where its files have none, as of a head that is new."""
    model, stored = skeleton(folder, head), stored_tensors(folder)
    names = names_in_files(model, stored)

    def read(parameter: str) -> Tensor | None:
        place = place_of(model, parameter, names, transposed=False, own_names=False)
        return read_weight(stored[place.tensor]) if place else None

    return read


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
    wanted = [f"{path}.{name}" for path, state in adapter.extras.items() for name in state if name != ROWS]
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


def _experts_in_files(model: "PreTrainedModel", stored: Iterable[str]) -> dict[str, list[list[str]]]:
    """Parameter -> the names of its tensors, expert by expert, for each of the weights that are put one upon the other.

    Only what is stacked, and then joined by rows, is known here: no expert is turned or taken apart on the way.
    """
    converters = {
        pattern: converter
        for converter in conversions(model)
        if [(type(step).__name__, step.dim) for step in converter.operations] in STACKED
        for pattern in converter.source_patterns
    }
    found: dict[str, dict[str, list[str]]] = {}
    for name, parameter, pattern in _loaded_as(model, stored):
        if pattern in converters:
            order = dict.fromkeys(converters[pattern].source_patterns)
            found.setdefault(parameter, {key: [] for key in order})[pattern].append(name)
    return {parameter: [sorted(names, key=_natural) for names in parts.values()] for parameter, parts in found.items()}


def _natural(name: str) -> list[int]:
    """experts.2 before experts.10."""
    return [int(part) for part in name.split(".") if part.isdigit()]


def conversions(model: "PreTrainedModel") -> list:
    """transformers' rules for tensors that become part of another one as a model is loaded."""
    return _rules(model)[1]


def _rules(model: "PreTrainedModel") -> tuple[list, list]:
    """(renamings, conversions)"""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    return [rule for rule in rules if not isinstance(rule, WeightConverter)], converters


def names_in_files(model: "PreTrainedModel", stored: Iterable[str]) -> dict[str, str]:
    """Parameter name -> name in the files, for every tensor that is loaded as it is (experts are fused on the way)."""
    known = model.state_dict()
    return {
        renamed: name for name, renamed, converted in _loaded_as(model, stored) if renamed in known and not converted
    }


def _loaded_as(model: "PreTrainedModel", stored: Iterable[str]) -> Iterator[tuple[str, str, str | None]]:
    """(name in the files, name in the model, the pattern of the conversion on the way if there is one)"""
    from transformers.core_model_loading import rename_source_key

    renamings, converters = _rules(model)
    known = model.state_dict()
    for name in stored:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = name, None
        yield name, renamed, pattern


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


def _misfit(adapter: Adapter, path: str, parts: Parts, stored: Mapping[str, StoredTensor]) -> Problem | None:
    factors = adapter.layers[path]
    shape = (factors.B.shape[0], factors.A.shape[1])
    tensors = [stored[part.tensor] for part in parts]
    for part, tensor in zip(parts, tensors, strict=True):
        if tensor.dtype not in FLOATS:
            return Problem(
                f"the base is quantised on disk: {part.tensor} is stored as {tensor.dtype}",
                where=str(tensor.file),
                fix="give the original 16-bit model as `--base`: merging into few bits would lose most of the update",
            )
    if all(fits(part, tensor.shape, shape) for part, tensor in zip(parts, tensors, strict=True)):
        return None
    return Problem(
        f"{parts[0].tensor} is {list(tensors[0].shape)} in the files, and the adapter changes a weight of {list(shape)}",
        where=str(tensors[0].file),
        fix="give the base it was trained on with `--base`",
    )


def fits(part: Place, stored: tuple[int, ...], shape: tuple[int, int]) -> bool:
    """Whether a tensor of the files is the part of a weight [out, in] that it should be."""
    matrix = stored if part.number is None else stored[1:]
    matrix = matrix[::-1] if part.transposed else (matrix[0], prod(matrix[1:]))
    return matrix == (len(range(shape[0])[part.rows]), shape[1])


def _missing(path: str, folder: Path) -> Problem:
    return Problem(
        f"the files hold no weight for {path} as one tensor",
        where=str(folder),
        fix="give the original 16-bit model as `--base`; a quantised or converted one can't be merged into",
    )
