"""Checkpoints: what is learned, optimizer and progress in one folder that is either whole or not there. No pickle.

    step-0000100/
      adapter_config.json  adapter_model.safetensors     PEFT's files: a checkpoint can be evaluated or merged as it is;
                                                         with `training.method: full` model.safetensors, every weight
      optimizer.safetensors                              its tensors as `<parameter>/<state>`
      snapshot.safetensors                               where a spike would go back to; with `rewind_on_spike` alone
      state.json                                         progress, the recipe's settings, the rest of the optimizer
      MANIFEST.json                                      size and SHA-256 of each file, written last

Each file is written into a draft beside the folder and forced to disk; the draft is read back and compared with what is
in memory; then it is renamed, and the rename forced to disk. Only then is a step saved, and an older one let go.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_cli.durable import draft_of, remove, sync_path, write_synced
from lora_cli.errors import DivergedError, ModelError, Problem, StorageError
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.config import of_expert
from lora_cli.lora.inject import lora_layers, trained_beside
from lora_cli.lora.peft_format import CONFIG, WEIGHTS, adapter_files, load_adapter
from lora_cli.lora.shards import put
from lora_cli.lora.tuned import WEIGHTS as EVERY_WEIGHT
from lora_cli.lora.tuned import Tuned
from lora_cli.train.optim import OptimizerState, Parameters, restore_optimizer
from lora_cli.train.progress import Progress
from lora_cli.train.rewind import Snapshot

log = logging.getLogger(__name__)

OPTIMIZER = "optimizer.safetensors"
SNAPSHOT = "snapshot.safetensors"
STATE = "state.json"
MANIFEST = "MANIFEST.json"
PREFIX = "step-"
DAMAGED = ".damaged-"
FACTORS, MOMENTS = "weights", "optimizer"  # what the tensors of a snapshot belong to

Learned = Adapter | Tuned


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    progress: Progress
    settings: Mapping[str, object]  # the recipe's values when it was written, by dotted key


def save_checkpoint(
    checkpoints: Path,
    progress: Progress,
    learned: Learned,
    optimizer: OptimizerState,
    *,
    settings: Mapping[str, object],
    transposed: bool,
    keep: int,
    spare: int | None = None,
    snapshot: Snapshot | None = None,
) -> Path:
    """Write one checkpoint, then remove what is older than the newest `keep` whole ones, but for the step `spare`.

    Returns its folder, whole and on the disk. Raises DivergedError for values that are not finite, and StorageError
    where the disk gives back something else; nothing has changed then.
    """
    learned.check_finite()
    tensors, scalars = optimizer
    _check_finite(tensors)
    contents = KINDS[type(learned)].files(learned, transposed) | {OPTIMIZER: save(tensors)}
    state = {"progress": progress.as_json(), "settings": dict(settings), "optimizer": scalars}
    if snapshot:
        contents[SNAPSHOT] = save(_snapshot_tensors(snapshot))
        state["snapshot"] = {"step": snapshot.step, "optimizer": snapshot.scalars}
    contents[STATE] = _json(state)
    folder = checkpoints / folder_name(progress.step)
    if fault_of(folder) is not None:  # else it is there already: the state behind a step is one and the same
        _write(folder, contents, lambda draft: _check_read_back(draft, contents, learned, tensors))
    _rotate(checkpoints, keep, spare)
    return folder


def folder_name(step: int) -> str:
    return f"{PREFIX}{step:07d}"


def newest_checkpoint(checkpoints: Path) -> Checkpoint | None:
    """The newest checkpoint whose manifest holds; damaged ones are passed over."""
    for folder in reversed(_by_step(checkpoints)):
        if fault_of(folder) is None:
            state = json.loads((folder / STATE).read_text())
            return Checkpoint(folder, Progress.from_json(state["progress"]), state["settings"])
    return None


def set_damaged_aside(checkpoints: Path) -> None:
    """Give those above the newest whole checkpoint another name, and say so: their bytes stay, for who wants to look."""
    for folder in reversed(_by_step(checkpoints)):
        if (fault := fault_of(folder)) is None:
            return
        log.warning("%s is damaged (%s): kept as %s, going back to the one before", folder, fault, _aside(folder).name)


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer, parameters: Parameters) -> Snapshot | None:
    """Put what a checkpoint holds and its optimizer state into a model whose LoRA layers, if it has any, are in place.

    Returns the snapshot that it holds.
    """
    learned = load_learned(checkpoint.folder)
    KINDS[type(learned)].restore(learned, model)
    tensors = load_file(checkpoint.folder / OPTIMIZER)
    state = json.loads((checkpoint.folder / STATE).read_text())
    restore_optimizer(optimizer, parameters, tensors, state["optimizer"])
    if "snapshot" not in state:
        return None
    return _snapshot(load_file(checkpoint.folder / SNAPSHOT), state["snapshot"])


def load_learned(folder: Path) -> Learned:
    """What a checkpoint holds: an adapter, or every weight of a model."""
    return KINDS[Tuned if (folder / EVERY_WEIGHT).is_file() else Adapter].load(folder)


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"no readable {MANIFEST}"
    if not any({*kind.names, OPTIMIZER, STATE} <= set(listed) for kind in KINDS.values()):
        return f"no readable {MANIFEST}"
    for name, (size, digest) in listed.items():
        file = folder / name
        try:
            if not file.is_file() or file.stat().st_size != size:
                return f"{name} is missing or cut"
            if hashlib.sha256(file.read_bytes()).hexdigest() != digest:
                return f"{name} has changed"
        except OSError as error:  # a bad sector
            return f"{name} can't be read: {error.strerror}"
    return None


def _write(folder: Path, contents: Mapping[str, bytes], check: Callable[[Path], None]) -> None:
    """The files and their manifest, all of them or none; `check` looks at the draft before it takes its name."""
    manifest = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in sorted(contents.items())
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = draft_of(folder)
    try:
        draft.mkdir()
        for name, content in contents.items():
            write_synced(draft / name, content)
        write_synced(draft / MANIFEST, _json(manifest))
        sync_path(draft)
        check(draft)
        if folder.exists():  # of the same step, and damaged
            _aside(folder)
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    sync_path(folder.parent)


def _check_read_back(
    draft: Path, contents: Mapping[str, bytes], learned: Learned, tensors: Mapping[str, Tensor]
) -> None:
    """The bytes are those in memory, and read as the weights and the optimizer state that they came from."""
    if (
        any((draft / name).read_bytes() != content for name, content in contents.items())
        or fault_of(draft) is not None
        or load_learned(draft).digest() != learned.digest()
        or not _same(load_file(draft / OPTIMIZER), tensors)
    ):
        fix = "check the disk; `--resume` continues from the checkpoint before"
        raise StorageError(Problem("what was written does not read back the same", where=str(draft), fix=fix))


def _same(read: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> bool:
    return read.keys() == tensors.keys() and all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        fix = "lower `training.learning_rate`; the last checkpoint is untouched"
        what = f"the optimizer holds values that are not finite in {len(broken)} tensors, first {broken[0]}"
        raise DivergedError(Problem(what, fix=fix))


def _snapshot_tensors(snapshot: Snapshot) -> dict[str, Tensor]:
    weights = {f"{FACTORS}/{name}": tensor for name, tensor in snapshot.weights.items()}
    return weights | {f"{MOMENTS}/{name}": tensor for name, tensor in snapshot.tensors.items()}


def _snapshot(found: Mapping[str, Tensor], state: Mapping) -> Snapshot:
    parts = {
        part: {name.removeprefix(f"{part}/"): tensor for name, tensor in found.items() if name.startswith(f"{part}/")}
        for part in (FACTORS, MOMENTS)
    }
    return Snapshot(state["step"], parts[FACTORS], parts[MOMENTS], state["optimizer"])


def _rotate(checkpoints: Path, keep: int, spare: int | None) -> None:
    whole = 0
    for folder in reversed(_by_step(checkpoints)):
        if whole < keep:
            whole += fault_of(folder) is None
        elif folder.name != folder_name(spare or 0):
            remove(folder)


def _aside(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}{DAMAGED}{number}")).exists():
        number += 1
    folder.rename(aside)
    return aside


def _restore_adapter(adapter: Adapter, model: nn.Module) -> None:
    _restore_layers(adapter, model)
    _restore_extras(adapter, model)


def _restore_weights(tuned: Tuned, model: nn.Module) -> None:
    if {name: p.shape for name, p in model.named_parameters()} != {n: t.shape for n, t in tuned.weights.items()}:
        raise ModelError(_of_another_recipe("weights are not those of this recipe's base"))
    tuned.copy_into(model)


def _restore_layers(adapter: Adapter, model: nn.Module) -> None:
    layers = lora_layers(model)
    if set(layers) != {of_expert(path)[0] for path in adapter.layers}:
        raise ModelError(_of_another_recipe("layers are not those of this recipe's targets"))
    with torch.no_grad():
        for path, layer in layers.items():
            factors, r = adapter.factors_at(path), layer.r
            layer.begin_at(factors.A[..., :r, :], factors.B[..., :r])
            if factors.A.shape[-2] == 2 * r:  # the second half is the start that is taken off
                layer.start_A, layer.start_B = (
                    factors.A[..., r:, :].to(layer.lora_A.device),
                    -factors.B[..., r:].to(layer.lora_A.device),
                )
            else:
                layer.start_A = layer.start_B = None
            if factors.magnitude is not None:
                put(layer.magnitude, factors.magnitude)


def _restore_extras(adapter: Adapter, model: nn.Module) -> None:
    modules = trained_beside(model)
    if set(modules) != set(adapter.extras):
        raise ModelError(_of_another_recipe("biases or modules trained whole are not those of this recipe"))
    for path, module in modules.items():
        module.load(adapter.extras[path])


class Kind(NamedTuple):
    """How a checkpoint holds what is learned: the files that must be there, what they are made of and read as."""

    names: tuple[str, ...]
    files: Callable[[Any, bool], dict[str, bytes]]
    load: Callable[[Path], Learned]
    restore: Callable[[Any, nn.Module], None]


KINDS: dict[type[Learned], Kind] = {
    Adapter: Kind(
        (CONFIG, WEIGHTS),
        lambda adapter, transposed: adapter_files(adapter, transposed=transposed),
        load_adapter,
        _restore_adapter,
    ),
    Tuned: Kind((EVERY_WEIGHT,), lambda tuned, _: tuned.files(), Tuned.load, _restore_weights),
}


def _of_another_recipe(what: str) -> Problem:
    return Problem(f"the checkpoint's {what}", fix="resume with the recipe that the run was started with")


def _by_step(checkpoints: Path) -> list[Path]:
    """Oldest first, by the number in the name: a clock may jump, a number does not."""
    found = [path for path in checkpoints.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def _json(content: Mapping) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
