"""Which tensor of a base's files is the weight of which module: names on disk differ from the model's own.

    h.0.attn.c_attn.weight  ->  transformer.h.0.attn.c_attn       (GPT-2 on the hub was saved without its head)
    model.embed_tokens.weight  ->  lm_head                        (tied: one tensor for two modules)

transformers' own loading rules translate, so what is found here is what `from_pretrained` will load.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.errors import ModelError, Problem
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.base_files import StoredTensor, stored_tensors
from lora_cli.lora.inject import linears
from lora_cli.lora.weights import storage_of
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
    model = skeleton(folder)
    adapter.check_fits(model)
    stored = stored_tensors(folder)
    names = names_in_files(model, stored)
    problems, found = [], {}
    for path in adapter.layers:
        place = _place(model, path, names)
        if place is None or (problem := _misfit(adapter, place, stored[place.tensor])):
            problems.append(_missing(path, folder) if place is None else problem)
        else:
            found[path] = place
    if problems:
        raise ModelError(*problems[:3])
    return found


def names_in_files(model: "PreTrainedModel", stored: Iterable[str]) -> dict[str, str]:
    """Parameter name -> name in the files, for every tensor that is loaded as it is (experts are fused on the way)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    known = model.state_dict()
    found = {}
    for name in stored:
        renamed, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if renamed not in known and name in known:
            renamed, converter = name, None
        if converter is None and renamed in known:
            found[renamed] = name
    return found


def _place(model: "PreTrainedModel", path: str, names: Mapping[str, str]) -> Place | None:
    own = f"{path}.weight"
    transposed = storage_of(linears(model)[path]).transposed
    partners = [name for name in _tied_with(model, own) if name in names]
    absent = [name for name in _tied_with(model, own) if name not in names]
    tied = bool(partners or absent)
    if own in names:
        kept = absent[0] if absent and not partners else None
        return Place(path, names[own], transposed, names[own], kept, tied)
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
