"""Extracting: what a full fine-tune did to a base, as an adapter: ΔW = W_tuned − W_base, each cut to its best low rank.

Both models are read one tensor at a time, and one pair of tensors is in memory. What a LoRA adapter can't hold
(embeddings, norms, biases, experts, weights that were not chosen) is measured, and named wherever it has changed.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_cli.errors import DivergedError, ModelError, Problem
from lora_cli.export.adapter_folder import Made, made_by, write_adapter
from lora_cli.export.files import DTYPES, read_weight
from lora_cli.export.names import FLOATS, Place, names_in_files, place_of
from lora_cli.export.staging import refuse_output
from lora_cli.lora.adapter import Adapter, Factors
from lora_cli.lora.algebra import Fit, plain_config
from lora_cli.lora.base_files import StoredTensor, fingerprint, stored_tensors
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.inject import generator_for, linears
from lora_cli.lora.svd import SVD, distance, of_dense, of_dense_by_energy
from lora_cli.lora.targets import ALL_LINEAR, choose_targets, shortest_suffixes
from lora_cli.lora.weights import storage_of
from lora_cli.models.base import Base
from lora_cli.models.identity import tokenizer_identity
from lora_cli.models.load import head_paths, load_tokenizer, skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LeftOut:
    """A tensor that changed and is not in the adapter: ‖Δ‖, and ‖Δ‖ / ‖W‖ unless W is zero; neither where the two
    can't be subtracted, being of different shapes or in one model only."""

    name: str
    change: float | None
    relative: float | None


@dataclass(frozen=True)
class Extracted:
    made: Made
    left_out: tuple[LeftOut, ...]  # the most changed first
    unchanged: int  # modules that were chosen and are the same in both


@dataclass(frozen=True)
class _Model:
    """A model folder: its modules without weights, and where each parameter lies in its files."""

    folder: Path
    modules: "PreTrainedModel"
    stored: Mapping[str, StoredTensor]
    names: Mapping[str, str]

    @classmethod
    def of(cls, folder: Path) -> "_Model":
        modules, stored = skeleton(folder), stored_tensors(folder)
        return cls(folder, modules, stored, names_in_files(modules, stored))

    def place(self, path: str) -> Place | None:
        transposed = storage_of(linears(self.modules)[path]).transposed
        return place_of(self.modules, f"{path}.weight", self.names, transposed=transposed, own_names=False)

    def read(self, place: Place) -> Tensor:
        return read_weight(self.stored[place.tensor], transposed=place.transposed).float()


def extract(
    base: Base,
    tuned: Base,
    out: Path,
    *,
    r: int | None = None,
    energy: float | None = None,
    targets: str | Sequence[str] = ALL_LINEAR,
    progress: Callable[[str], None] = lambda path: None,
) -> Extracted:
    """Write tuned − base as an adapter of `base`, of rank `r` or of the ranks that hold `energy` of each ‖ΔW‖².

    Raises ModelError for models of different shapes, and where none of the chosen weights has changed.
    """
    refuse_output(out)
    before, after = _Model.of(base.folder), _Model.of(tuned.folder)
    _check_one_architecture(before, after)
    chosen = choose_targets(targets, list(linears(before.modules)), head=head_paths(before.modules))
    pairs = _pairs(before, after, chosen)
    layers: dict[str, Factors] = {}
    fits: dict[str, Fit] = {}
    for path, (first, second) in pairs.items():
        progress(path)
        update = after.read(second) - before.read(first)
        _check_finite(update, path, tuned)
        if not update.any():
            continue
        found = _decomposed(update, path, r, energy)
        rank = min(r, len(found.S)) if r else found.rank_of_energy(energy)
        layers[path] = found.factors(rank)
        fits[path] = Fit(found.norm, distance(update, layers[path]) / found.norm)
    left_out = _left_out(before, after, pairs, progress)
    if not layers:
        raise ModelError(_nothing(left_out, tuned))
    adapter = _adapter(before, base, tuned, layers, r=r, energy=energy)
    transposed = any(pairs[path][0].transposed for path in layers)
    written = write_adapter(adapter, out, tokenizer=_tokenizer(tuned), transposed=transposed)
    return Extracted(Made(adapter, written, fits), left_out, len(chosen) - len(layers))


def _check_one_architecture(before: _Model, after: _Model) -> None:
    kinds = [model.modules.config.model_type for model in (before, after)]
    if kinds[0] != kinds[1]:
        raise ModelError(
            Problem(
                f"the base is a {kinds[0]} model and the tuned one a {kinds[1]}",
                where=str(after.folder),
                fix="give the base that the model was tuned from with `--base`",
            )
        )


def _pairs(before: _Model, after: _Model, chosen: Sequence[str]) -> dict[str, tuple[Place, Place]]:
    """The places of each chosen weight in both models. Raises ModelError for what is missing, quantised or reshaped."""
    present = linears(after.modules)
    pairs, problems = {}, []
    for path in chosen:
        first = before.place(path)
        second = after.place(path) if path in present else None
        if problem := _mismatch(path, before, first, after, second):
            problems.append(problem)
        else:
            pairs[path] = (first, second)
    if problems:
        raise ModelError(*problems[:3])
    return pairs


def _mismatch(path: str, before: _Model, first: Place | None, after: _Model, second: Place | None) -> Problem | None:
    fix = "give the base that the model was tuned from with `--base`, both unquantised"
    for model, place in ((before, first), (after, second)):
        if place is None:
            return Problem(f"the files hold no weight for {path} as one tensor", where=str(model.folder), fix=fix)
        if (dtype := model.stored[place.tensor].dtype) not in FLOATS:
            return Problem(f"{place.tensor} is quantised on disk, as {dtype}", where=str(model.folder), fix=fix)
    shapes = [model.stored[place.tensor].shape for model, place in ((before, first), (after, second))]
    if shapes[0] == shapes[1]:
        return None
    what = f"{path} is {list(shapes[0])} in the base and {list(shapes[1])} in the tuned model"
    return Problem(what, where=str(after.folder), fix=fix)


def _decomposed(update: Tensor, path: str, r: int | None, energy: float | None) -> SVD:
    generator = generator_for(0, path)
    if r:
        return of_dense(update, r, generator)
    return of_dense_by_energy(update, energy, generator)


def _left_out(
    before: _Model, after: _Model, pairs: Mapping[str, tuple[Place, Place]], progress: Callable[[str], None]
) -> tuple[LeftOut, ...]:
    """Whatever else differs between the two models' files. Two names of one tied tensor are one."""
    held = {f"{path}.weight" for path in pairs}
    found = []
    for name, (first, second) in _counterparts(before, after, held).items():
        progress(name)
        left = _compared(name, before.stored.get(first), after.stored.get(second))
        if left.change != 0:
            found.append(left)
    return tuple(sorted(found, key=lambda left: -(inf if left.relative is None else left.relative)))


def _counterparts(before: _Model, after: _Model, held: Collection[str]) -> dict[str, tuple[str | None, str | None]]:
    """Parameter -> its tensor in the files of both; what is converted on loading (experts) goes by its name there."""
    ties = {**before.modules.all_tied_weights_keys, **after.modules.all_tied_weights_keys}
    found: dict[tuple[str | None, str | None], str] = {}
    for name in dict.fromkeys([*before.names, *after.names, *ties, *ties.values()]):
        partners = [name, ties.get(name, name), *(target for target, source in ties.items() if source == name)]
        pair = tuple(next((m.names[p] for p in partners if p in m.names), None) for m in (before, after))
        if name not in held:
            found.setdefault(pair, name)
    mapped = {*before.names.values(), *after.names.values()}
    for name in dict.fromkeys([*before.stored, *after.stored]):
        if name not in mapped:
            found[tuple(name if name in model.stored else None for model in (before, after))] = name
    return {name: pair for pair, name in found.items() if pair != (None, None)}


def _compared(name: str, first: StoredTensor | None, second: StoredTensor | None) -> LeftOut:
    if first is None or second is None or first.shape != second.shape:
        return LeftOut(name, None, None)
    if first.dtype not in DTYPES or second.dtype not in DTYPES:
        same = first.dtype == second.dtype and _bytes(first) == _bytes(second)
        return LeftOut(name, 0.0 if same else None, None)
    W = read_weight(first).float()
    change = float(torch.linalg.vector_norm(read_weight(second).float() - W, dtype=torch.float64))
    norm = float(torch.linalg.vector_norm(W, dtype=torch.float64))
    return LeftOut(name, change, change / norm if norm else None)


def _bytes(tensor: StoredTensor) -> bytes:
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        return stream.read(tensor.end - tensor.start)


def _adapter(before: _Model, base: Base, tuned: Base, layers: Mapping[str, Factors], **how: object) -> Adapter:
    ranks = {path: len(factors.A) for path, factors in layers.items()}
    targets = shortest_suffixes(list(layers), [name for name, _ in before.modules.named_modules()])
    like = LoRAConfig(
        r=1, lora_alpha=1, target_modules=targets, base_model_name_or_path=base.name, revision=base.revision
    )
    folder = _tokenizer(tuned)
    tokenizer = tokenizer_identity(load_tokenizer(folder, writes=False)) if folder else None
    adapter = Adapter(
        plain_config(ranks, like=like, targets=targets), layers, fingerprint(base.folder), tokenizer=tokenizer
    )
    tuned_is = {"name": Path(tuned.name).name, "fingerprint": fingerprint(tuned.folder).short}
    return made_by("extract", adapter, [tuned_is], **{key: value for key, value in how.items() if value})


def _tokenizer(tuned: Base) -> Path | None:
    return tuned.folder if (tuned.folder / "tokenizer_config.json").is_file() else None


def _check_finite(update: Tensor, path: str, tuned: Base) -> None:
    if not update.isfinite().all():
        raise DivergedError(
            Problem(
                f"{path} has values that are not finite in one of the models",
                where=str(tuned.folder),
                fix="give whole models; this one diverged in training or was damaged on the way",
            )
        )


def _nothing(left_out: Sequence[LeftOut], tuned: Base) -> Problem:
    if left_out:
        names = ", ".join(left.name for left in left_out[:3])
        what = f"none of the chosen weights has changed; what has is nothing that an adapter can hold: {names}"
        return Problem(what, where=str(tuned.folder), fix="name other modules with `--targets`")
    return Problem("the two models are the same", where=str(tuned.folder), fix="give the tuned model with `--tuned`")
