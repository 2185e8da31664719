"""Extracting: what a full fine-tune did to a base, as an adapter: ΔW = W_tuned − W_base, each cut to its best low rank.

Both models are read one tensor at a time, and one pair of tensors is in memory. What is no low-rank update (norms, biases,
weights that were not chosen) is held as it is where that is asked for (`extract_beside.py`), else measured, and named
wherever it has changed.
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
from lora_cli.export.extract_beside import Kept, held_beside, held_whole, rows_of_tokens, whole_paths
from lora_cli.export.files import DTYPES, read_weight
from lora_cli.export.names import FLOATS, Files, Parts
from lora_cli.export.staging import refuse_output
from lora_cli.lora.adapter import Adapter, Factors, forms_of, paths_of
from lora_cli.lora.algebra import Fit, evened, plain_config
from lora_cli.lora.base_files import StoredTensor, fingerprint, stored_tensors
from lora_cli.lora.beside import Beside
from lora_cli.lora.config import LoRAConfig, of_expert
from lora_cli.lora.inject import generator_for, names_of_targets
from lora_cli.lora.svd import SVD, distance, of_dense, of_dense_by_energy
from lora_cli.lora.targets import ALL_LINEAR, choose_targets
from lora_cli.lora.weights import Weight, fan_in_fan_out
from lora_cli.models.base import Base
from lora_cli.models.identity import tokenizer_identity
from lora_cli.models.load import by_name_alone, load_tokenizer, skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    files: Files

    @classmethod
    def of(cls, folder: Path) -> "_Model":
        return cls(folder, Files.of(skeleton(folder), stored_tensors(folder)))

    @property
    def modules(self) -> "PreTrainedModel":
        return self.files.model

    @property
    def stored(self) -> Mapping[str, StoredTensor]:
        return self.files.stored

    @property
    def names(self) -> Mapping[str, str]:
        return self.files.names

    @property
    def weights(self) -> Mapping[str, Weight]:
        return self.files.weights


def extract(
    base: Base,
    tuned: Base,
    out: Path,
    *,
    r: int | None = None,
    energy: float | None = None,
    targets: str | Sequence[str] = ALL_LINEAR,
    kept: Kept | None = None,
    progress: Callable[[str], None] = lambda path: None,
) -> Extracted:
    """Write tuned − base as an adapter of `base`, of rank `r` or of the ranks that hold `energy` of each ‖ΔW‖².

    What is `kept` is held as it is, and so are the rows of tokens that the base has none for. Raises ModelError for models
    of different shapes, and where none of the chosen weights has changed.
    """
    refuse_output(out)
    before, after = _Model.of(base.folder), _Model.of(tuned.folder)
    _check_one_architecture(before, after)
    kept = kept or Kept()
    whole = whole_paths(before.modules, kept)
    targeted = choose_targets(targets, list(before.weights), head=by_name_alone(before.modules), whole=whole)
    chosen = [path for target in targeted for path in paths_of(target, before.weights[target])]
    pairs = _pairs(before, after, chosen)
    layers: dict[str, Factors] = {}
    fits: dict[str, Fit] = {}
    for path, (first, second) in pairs.items():
        progress(path)
        update = after.files.read(second) - before.files.read(first)
        _check_finite(update, path, tuned)
        if not update.any():
            continue
        found = _decomposed(update, path, r, energy)
        rank = min(r, len(found.S)) if r else found.rank_of_energy(energy)
        layers[path] = found.factors(rank)
        fits[path] = Fit(found.norm, distance(update, layers[path]) / found.norm)
    layers = evened(layers | _unchanged_experts(layers, before.weights))
    tokenizer = _read_tokenizer(tuned)
    beside = held_beside(
        before.modules,
        after.modules,
        (base.folder, tuned.folder),
        kept,
        whole=whole,
        adapted=layers,
        known_tokens=tokenizer and 1 + max(tokenizer.get_vocab().values()),
    )
    left_out = _left_out(before, after, pairs, held_whole(beside), progress)
    if not layers:
        raise ModelError(_nothing(left_out, tuned))
    adapter = _adapter(before, base, tuned, layers, beside, tokenizer, r=r, energy=energy)
    transposed = fan_in_fan_out(before.weights[of_expert(path)[0]] for path in layers)
    written = write_adapter(adapter, out, tokenizer=_tokenizer(tuned), transposed=transposed)
    return Extracted(Made(adapter, written, fits), left_out, len(chosen) - len(fits))


def _unchanged_experts(layers: Mapping[str, Factors], weights: Mapping[str, Weight]) -> dict[str, Factors]:
    """Experts that are the same in both models, as updates of nothing: PEFT's format has all experts of a parameter."""
    changed = {of_expert(path)[0] for path in layers if of_expert(path)[1] is not None}
    found = {}
    for parameter in changed:
        out_features, in_features = weights[parameter].shape
        nothing = Factors(torch.zeros(1, in_features), torch.zeros(out_features, 1))
        found |= {path: nothing for path in paths_of(parameter, weights[parameter]) if path not in layers}
    return found


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


def _pairs(before: _Model, after: _Model, chosen: Sequence[str]) -> dict[str, tuple[Parts, Parts]]:
    """The places of each chosen weight in both models. Raises ModelError for what is missing, quantised or reshaped."""
    pairs, problems = {}, []
    for path in chosen:
        first = before.files.parts_of(path)
        second = after.files.parts_of(path) if of_expert(path)[0] in after.weights else ()
        if problem := _mismatch(path, before, first, after, second):
            problems.append(problem)
        else:
            pairs[path] = (first, second)
    if problems:
        raise ModelError(*problems[:3])
    return pairs


def _mismatch(path: str, before: _Model, first: Parts, after: _Model, second: Parts) -> Problem | None:
    fix = "give the base that the model was tuned from with `--base`, both unquantised"
    for model, parts in ((before, first), (after, second)):
        if not parts:
            return Problem(f"the files hold no weight for {path} as one tensor", where=str(model.folder), fix=fix)
        for part in parts:
            if (dtype := model.stored[part.tensor].dtype) not in FLOATS:
                return Problem(f"{part.tensor} is quantised on disk, as {dtype}", where=str(model.folder), fix=fix)
    shapes = [model.weights[of_expert(path)[0]].shape for model in (before, after)]
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
    before: _Model,
    after: _Model,
    pairs: Mapping[str, tuple[Parts, Parts]],
    beside: Collection[str],
    progress: Callable[[str], None],
) -> tuple[LeftOut, ...]:
    """Whatever else differs between the two models' files. Two names of one tied tensor are one."""
    experts = {path: both for path, both in pairs.items() if of_expert(path)[1] is not None}
    held = {f"{path}.weight" for path in pairs} | {of_expert(path)[0] for path in experts}
    held |= {part.tensor for both in experts.values() for parts in both for part in parts} | set(beside)
    tables, found = rows_of_tokens(before.modules, after.modules), []
    for name, (first, second) in _counterparts(before, after, held).items():
        progress(name)
        left = _compared(name, before.stored.get(first), after.stored.get(second), by_rows=name in tables)
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
        if name not in mapped and name not in held:
            found[tuple(name if name in model.stored else None for model in (before, after))] = name
    return {name: pair for pair, name in found.items() if pair != (None, None)}


def _compared(name: str, first: StoredTensor | None, second: StoredTensor | None, *, by_rows: bool) -> LeftOut:
    """The two tensors; with `by_rows`, the rows that both have."""
    if first is None or second is None or first.shape[by_rows:] != second.shape[by_rows:]:
        return LeftOut(name, None, None)
    if first.dtype not in DTYPES or second.dtype not in DTYPES:
        same = first.dtype == second.dtype and _bytes(first) == _bytes(second)
        return LeftOut(name, 0.0 if same else None, None)
    W, tuned = (read_weight(tensor).float() for tensor in (first, second))
    if by_rows:
        W, tuned = W[: len(tuned)], tuned[: len(W)]
    change = float(torch.linalg.vector_norm(tuned - W, dtype=torch.float64))
    norm = float(torch.linalg.vector_norm(W, dtype=torch.float64))
    return LeftOut(name, change, change / norm if norm else None)


def _bytes(tensor: StoredTensor) -> bytes:
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        return stream.read(tensor.end - tensor.start)


def _adapter(
    before: _Model,
    base: Base,
    tuned: Base,
    layers: Mapping[str, Factors],
    beside: Beside,
    tokenizer: "PreTrainedTokenizerBase | None",
    **how: object,
) -> Adapter:
    ranks = {path: len(factors.A) for path, factors in layers.items()}
    adapted = list(dict.fromkeys(of_expert(path)[0] for path in layers))
    targets, parameters = names_of_targets(before.modules, adapted)
    like = LoRAConfig(
        r=1,
        lora_alpha=1,
        target_modules=targets,
        target_parameters=parameters,
        base_model_name_or_path=base.name,
        revision=base.revision,
    )
    adapter = Adapter(
        beside.put_into(plain_config(ranks, like=like, targets=targets)),
        layers,
        fingerprint(base.folder),
        beside.extras,
        tokenizer=tokenizer_identity(tokenizer) if tokenizer else None,
        forms=forms_of({path: before.weights[path] for path in adapted}),
    )
    tuned_is = {"name": Path(tuned.name).name, "fingerprint": fingerprint(tuned.folder).short}
    return made_by("extract", adapter, [tuned_is], **{key: value for key, value in how.items() if value})


def _tokenizer(tuned: Base) -> Path | None:
    return tuned.folder if (tuned.folder / "tokenizer_config.json").is_file() else None


def _read_tokenizer(tuned: Base) -> "PreTrainedTokenizerBase | None":
    folder = _tokenizer(tuned)
    return load_tokenizer(folder, writes=False) if folder else None


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
