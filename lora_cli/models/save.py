"""A model as a folder of its own, as transformers writes and reads it: what full fine-tuning leaves."""

import hashlib
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_cli.errors import ModelError, Problem
from lora_cli.lora.base_files import weight_files
from lora_cli.models.base import Base
from lora_cli.models.load import load_model
from lora_cli.models.quiet import quiet_transformers
from lora_cli.models.trust import may_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "config.json"


def save_model(model: "PreTrainedModel", base: Base, folder: Path) -> None:
    """Write the weights as safetensors, in shards where they are large, and the configs beside them.

    The config is the base's own: while it trains, its dropouts are off.
    """
    from transformers import AutoConfig

    quiet_transformers()
    model.save_pretrained(folder)
    config = AutoConfig.from_pretrained(base.folder, trust_remote_code=may_run(base.folder))
    config.dtype, config.architectures = model.dtype, [_plain(model).__name__]
    config.save_pretrained(folder)
    for file in weight_files(folder):  # safetensors writes for its owner alone
        file.chmod((folder / CONFIG).stat().st_mode & 0o777)


def check_saved(model: "PreTrainedModel", folder: Path) -> None:
    """Raise ModelError where transformers does not read back the very weights that are in memory."""
    read = dict(load_model(Base(str(folder), folder), dtype=model.dtype).named_parameters())
    own = dict(model.named_parameters())
    if read.keys() != own.keys() or any(not torch.equal(read[name], p.detach().cpu()) for name, p in own.items()):
        fix = "resume from the last checkpoint; check the disk"
        raise ModelError(Problem("what was saved is not what was trained", where=str(folder), fix=fix))


def weights_digest(folder: Path) -> str:
    """SHA-256 of the files that hold a folder's weights. Raises ModelError where there are none."""
    found = hashlib.sha256()
    for file in sorted(weight_files(folder)):
        with file.open("rb") as content:
            found.update(file.name.encode() + file_digest(content, "sha256").digest())
    return found.hexdigest()


def _plain(model: "PreTrainedModel") -> type:
    """The class of transformers; a model that computes blocks again has one of its own below it."""
    return next(cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers."))
