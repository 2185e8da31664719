"""The safetensors files of a base model on disk: which file holds which tensor, and a fingerprint of them all.

Headers are read here by hand (8 bytes of length, then JSON), so that looking into a base costs no torch and no weights.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_cli.errors import ModelError, Problem, SafetyError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
LARGEST_HEADER_BYTES = 100_000_000  # safetensors' own limit
SAMPLED_TENSORS = 24
SAMPLED_BYTES = 4096


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `start` and `end` are byte offsets in its file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Fingerprint:
    """What a base is: the names, types and shapes of all its tensors in one hash, and samples of some tensors' bytes.

    Made by `fingerprint`, kept in an adapter's metadata and in run.json.
    """

    layout: str
    samples: Mapping[str, str]

    def to_json(self) -> str:
        return json.dumps({"layout": self.layout, "samples": dict(self.samples)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Fingerprint":
        found = json.loads(text)
        return cls(str(found["layout"]), {str(name): str(digest) for name, digest in found["samples"].items()})

    @property
    def short(self) -> str:
        """Twelve characters to print."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def differences(self, other: "Fingerprint") -> list[str]:
        """The tensors that tell the two bases apart; empty when they are the same."""
        names = [name for name in self.samples if other.samples.get(name) != self.samples[name]]
        return names or (["the names, types or shapes of the tensors"] if self.layout != other.layout else [])


def fingerprint(folder: Path) -> Fingerprint:
    """Reads the headers and some 100 KiB, whatever the size of the model: the same for a folder and a copy of it."""
    tensors = stored_tensors(folder)
    names = sorted(tensors)
    layout = json.dumps([(name, tensors[name].dtype, tensors[name].shape) for name in names])
    step = max(1, len(names) // SAMPLED_TENSORS)
    samples = {name: _sample(tensors[name]) for name in names[::step]}
    return Fingerprint(hashlib.sha256(layout.encode()).hexdigest()[:16], samples)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder by its name in the files, one shard after the other."""
    return {name: tensor for file in weight_files(folder) for name, tensor in read_header(file).items()}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order. Raises for a folder without any, and for pickles."""
    if (folder / INDEX).is_file():
        return [_inside(folder, name) for name in dict.fromkeys(_weight_map(folder / INDEX).values())]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if any(path for pattern in PICKLES for path in folder.glob(pattern)):
        raise SafetyError(
            Problem(
                "the base has its weights as a pickle, which can run code when it is read",
                where=str(folder),
                fix="take a revision with .safetensors files, or convert it where that can do no harm",
            )
        )
    raise ModelError(
        Problem(f"no {WEIGHTS} and no {INDEX}", where=str(folder), fix="give a folder that `save_pretrained` wrote")
    )


def read_header(file: Path, most_bytes: int = LARGEST_HEADER_BYTES) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, from its header alone, which may have `most_bytes`."""
    header, data = _header(file, most_bytes)
    try:
        return {
            name: StoredTensor(
                file, entry["dtype"], tuple(entry["shape"]), *(data + offset for offset in entry["data_offsets"])
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (KeyError, TypeError) as error:
        raise _unreadable(file) from error


def read_metadata(file: Path) -> dict[str, str]:
    """The free text that a safetensors file carries."""
    return _header(file, LARGEST_HEADER_BYTES)[0].get("__metadata__", {})


def _header(file: Path, most_bytes: int) -> tuple[dict, int]:
    """The JSON header and the offset at which the data begins."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > most_bytes:
            raise ModelError(
                Problem(f"its header claims {size:,} bytes", where=str(file), fix="download it again: it is damaged")
            )
        text = stream.read(size)
    try:
        header = json.loads(text, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise _unreadable(file) from error
    if not isinstance(header, dict):
        raise _unreadable(file)
    return header, 8 + size


def _without_doubles(pairs: list[tuple[str, object]]) -> dict:
    """Of two tensors of one name, which is meant depends on the reader."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def _unreadable(file: Path) -> ModelError:
    return ModelError(Problem("its header can't be read", where=str(file), fix="download it again: it is damaged"))


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text())["weight_map"]
        return {str(name): str(file) for name, file in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            Problem("its `weight_map` can't be read", where=str(index), fix="download it again: it is damaged")
        ) from error


def _inside(folder: Path, name: str) -> Path:
    if Path(name).name != name:
        raise SafetyError(
            Problem(
                f"the index points outside its folder: {name!r}", where=str(folder / INDEX), fix="don't use this model"
            )
        )
    if not (folder / name).is_file():
        raise ModelError(
            Problem(f"{name} is missing", where=str(folder), fix="download the model again: a part of it is not there")
        )
    return folder / name


def _sample(tensor: StoredTensor) -> str:
    """Hash of the first, middle and last bytes of a tensor."""
    size = tensor.end - tensor.start
    digest = hashlib.sha256()
    with tensor.file.open("rb") as stream:
        for offset in (0, max(0, size // 2 - SAMPLED_BYTES // 2), max(0, size - SAMPLED_BYTES)):
            stream.seek(tensor.start + offset)
            digest.update(stream.read(min(SAMPLED_BYTES, size)))
    return digest.hexdigest()[:16]
