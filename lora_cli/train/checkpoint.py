"""Checkpoints: adapter, optimizer and progress in one folder that is either whole or not there. No pickle.

    step-0000100/
      adapter_config.json  adapter_model.safetensors     PEFT's files: a checkpoint can be evaluated or merged as it is
      optimizer.safetensors                              its tensors as `<parameter>/<state>`
      state.json                                         progress, the recipe's settings, the rest of the optimizer
      MANIFEST.json                                      size and SHA-256 of each file, written last

Written into a folder beside it, synced to the disk, and renamed.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_cli.errors import ModelError, Problem
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.inject import lora_layers
from lora_cli.lora.peft_format import load_adapter, save_adapter
from lora_cli.train.loop import Progress
from lora_cli.train.optim import Parameters

log = logging.getLogger(__name__)

OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
MANIFEST = "MANIFEST.json"
PREFIX = "step-"
DRAFT = ".tmp-"


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    progress: Progress
    settings: Mapping[str, object]  # the recipe's values when it was written, by dotted key


def save_checkpoint(
    checkpoints: Path,
    progress: Progress,
    adapter: Adapter,
    optimizer: Optimizer,
    parameters: Parameters,
    *,
    settings: Mapping[str, object],
    transposed: bool,
    keep: int,
) -> Path:
    """Write one checkpoint, then remove the oldest above `keep`. Returns its folder, whole and on the disk."""
    folder = checkpoints / f"{PREFIX}{progress.step:07d}"
    draft = checkpoints / f"{DRAFT}{folder.name}-{os.getpid()}"
    for left_behind in checkpoints.glob(f"{DRAFT}*"):  # by a process that was killed
        shutil.rmtree(left_behind)
    save_adapter(adapter, draft, transposed=transposed)
    tensors, scalars = optimizer_state(optimizer, parameters)
    (draft / OPTIMIZER).write_bytes(save(tensors))
    _write_json(draft / STATE, {"progress": asdict(progress), "settings": dict(settings), "optimizer": scalars})
    _write_json(draft / MANIFEST, _manifest(draft))
    _sync(draft)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    _sync_folder(checkpoints)
    for old in _by_step(checkpoints)[:-keep]:
        shutil.rmtree(old)
    return folder


def newest_checkpoint(checkpoints: Path) -> Checkpoint | None:
    """The newest checkpoint whose manifest holds; damaged ones are named and passed over."""
    for folder in reversed(_by_step(checkpoints)):
        if (fault := _fault(folder)) is None:
            state = json.loads((folder / STATE).read_text())
            return Checkpoint(folder, Progress(**state["progress"]), state["settings"])
        log.warning("%s is damaged (%s): going back to the one before", folder, fault)
    return None


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer, parameters: Parameters) -> None:
    """Put a checkpoint's factors and optimizer state into a model whose LoRA layers are in place."""
    _restore_layers(load_adapter(checkpoint.folder), model)
    tensors = load_file(checkpoint.folder / OPTIMIZER)
    scalars = json.loads((checkpoint.folder / STATE).read_text())["optimizer"]
    restore_optimizer(optimizer, parameters, tensors, scalars)


def optimizer_state(optimizer: Optimizer, parameters: Parameters) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """The optimizer's state by parameter name: tensors as `<name>/<key>`, plain numbers apart from them."""
    tensors, scalars = {}, {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value.detach().to("cpu", copy=True).contiguous()
            else:
                scalars.setdefault(name, {})[key] = value
    return tensors, scalars


def restore_optimizer(
    optimizer: Optimizer, parameters: Parameters, tensors: Mapping[str, Tensor], scalars: Mapping[str, dict]
) -> None:
    """The inverse of `optimizer_state`; state tensors go where their parameter lies (a step counter stays where it was)."""
    for name, parameter in parameters.items():
        state = dict(scalars.get(name, {}))
        for key in (key for key in tensors if key.rpartition("/")[0] == name):
            tensor = tensors[key]
            state[key.rpartition("/")[2]] = (
                tensor if tensor.ndim == 0 and not _fused(optimizer) else tensor.to(parameter.device)
            )
        if state:
            optimizer.state[parameter] = state


def _restore_layers(adapter: Adapter, model: nn.Module) -> None:
    layers = lora_layers(model)
    if set(layers) != set(adapter.layers):
        raise ModelError(
            Problem(
                "the checkpoint's layers are not those of this recipe's targets",
                fix="resume with the recipe that the run was started with",
            )
        )
    with torch.no_grad():
        for path, layer in layers.items():
            factors, r = adapter.layers[path], len(layer.lora_A)
            layer.begin_at(factors.A[:r], factors.B[:, :r])
            if len(factors.A) == 2 * r:  # the second half is the start that is taken off
                layer.start_A, layer.start_B = (
                    factors.A[r:].to(layer.lora_A.device),
                    -factors.B[:, r:].to(layer.lora_A.device),
                )
            else:
                layer.start_A = layer.start_B = None
            if factors.magnitude is not None:
                layer.magnitude.copy_(factors.magnitude)


def _fused(optimizer: Optimizer) -> bool:
    return any(group.get("fused") for group in optimizer.param_groups)


def _by_step(checkpoints: Path) -> list[Path]:
    """Oldest first, by the number in the name: a clock may jump, a number does not."""
    found = [path for path in checkpoints.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def _manifest(folder: Path) -> dict[str, dict]:
    return {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in sorted(folder.iterdir())
    }


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"no readable {MANIFEST}"
    if not {OPTIMIZER, STATE} <= set(listed):
        return f"no readable {MANIFEST}"
    for name, (size, digest) in listed.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is missing or cut"
        if hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            return f"{name} has changed"
    return None


def _write_json(file: Path, content: Mapping) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")


def _sync(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
