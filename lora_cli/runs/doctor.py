"""What this machine is and can do, found by trying."""

import os
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from lora_cli.data.cache import MOST_BYTES, rows_cache, size
from lora_cli.errors import first_line
from lora_cli.kernels.products import has_bfloat16
from lora_cli.models.load import default_device
from lora_cli.train.trackers import TRACKERS

PACKAGES = (
    "lora-cli",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "safetensors",
    "gguf",
    *TRACKERS,
    "liger-kernel",
    "peft",
)
EXTRAS = {name: f"pip install 'lora-cli[{name}]'" for name in ("gguf", *TRACKERS)}


@dataclass(frozen=True)
class Ability:
    what: str
    possible: bool
    note: str


@dataclass(frozen=True)
class Findings:
    versions: dict[str, str | None]
    abilities: list[Ability]

    def as_json(self) -> dict:
        return {"versions": self.versions, "abilities": [asdict(ability) for ability in self.abilities]}


def examine() -> Findings:
    """Versions of the packages, and what can be done here; where it can't, the note says what would change that."""
    return Findings(
        {name: _version(name) for name in PACKAGES}, [*_devices(), *_formats(), *_extras(), *_surroundings()]
    )


def _devices() -> list[Ability]:
    device = default_device()
    gpus = [
        f"{torch.cuda.get_device_name(i)}, {torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB"
        for i in range(torch.cuda.device_count())
    ]
    return [
        Ability("train on a GPU", bool(gpus), "; ".join(gpus) or "torch sees none: training runs on the CPU"),
        Ability("train on the CPU", True, f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {_memory()}"),
        Ability(
            f"bfloat16 in hardware ({device.type})",
            has_bfloat16(device),
            "`model.dtype: auto` takes it" if has_bfloat16(device) else "`model.dtype: auto` takes float32",
        ),
    ]


def _formats() -> list[Ability]:
    return [_tried("quantize: nf4", "Linear4bit"), _tried("quantize: int8", "Linear8bitLt")]


def _tried(what: str, layer: str) -> Ability:
    """Quantise a small layer and run it."""
    try:
        import bitsandbytes.nn

        settings = {"has_fp16_weights": False} if layer == "Linear8bitLt" else {"quant_type": "nf4"}
        module = getattr(bitsandbytes.nn, layer)(64, 64, bias=False, **settings).to(default_device())
        module(torch.ones(1, 64, device=default_device()))
    except Exception as error:  # whatever it is, it is the finding
        return Ability(what, False, f"bitsandbytes: {first_line(error)}")
    return Ability(what, True, "bitsandbytes works on this device")


def _extras() -> list[Ability]:
    return [
        Ability(name, find_spec(name) is not None, "" if find_spec(name) else hint) for name, hint in EXTRAS.items()
    ]


def _surroundings() -> list[Ability]:
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    free = shutil.disk_usage(Path.cwd()).free / 1e9
    return [
        Ability(
            "download from the hub",
            not HF_HUB_OFFLINE,
            f"cache: {HF_HUB_CACHE}" if not HF_HUB_OFFLINE else "HF_HUB_OFFLINE is set",
        ),
        Ability(
            "gated models",
            get_token() is not None,
            "a token is there" if get_token() else "run `hf auth login`, or set HF_TOKEN",
        ),
        _cache(),
        Ability("write here", os.access(Path.cwd(), os.W_OK), f"{free:.0f} GB free in the current folder"),
    ]


def _cache() -> Ability:
    folder = rows_cache()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    held = f"{size(folder) / 1e9:.1f} GB of at most {MOST_BYTES / 1e9:.0f} in {folder}; it may be deleted at any time"
    return Ability("keep tokenized rows", there.is_dir() and os.access(there, os.W_OK), held)


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB of memory"
    except (ValueError, OSError):
        return "memory unknown"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
