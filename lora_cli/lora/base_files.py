"""The safetensors files of a base model on disk: which file holds which tensor, and a fingerprint of them all.

Headers are read here by hand (8 bytes of length, then JSON), so that looking into a base costs no torch and no weights.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from lora_cli.errors import ModelError, Problem, SafetyError
from lora_cli.limits import DAMAGED, TOO_LARGE, each_once, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
LARGEST_HEADER_BYTES = 100_000_000  # safetensors' own limit
# Bits an element, by the names that safetensors has for types
BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
CONVERT = "take a revision with .safetensors files, or convert it where that can do no harm"
LFS_POINTER = b"version "  # of the text that stands for a file until it is fetched
SAMPLED_TENSORS = 128
SAMPLED_BYTES = 4096
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of a layer or an expert, in a tensor's name


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

    @classmethod
    def from_record(cls, found: object) -> "Fingerprint | None":
        """Of what run.json has of it; None where that is nothing or no fingerprint."""
        try:
            return cls.from_json(json.dumps(found))
        except (TypeError, KeyError, AttributeError):
            return None

    @property
    def short(self) -> str:
        """Twelve characters to print."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def differences(self, other: "Fingerprint") -> list[str]:
        """The tensors that tell the two bases apart; empty when they are the same."""
        # earlier versions took samples of other tensors: where the layout is one, those that both have tell
        names = [name for name in self.samples if other.samples.get(name, self.samples[name]) != self.samples[name]]
        return names or (["the names, types or shapes of the tensors"] if self.layout != other.layout else [])


def fingerprint(folder: Path) -> Fingerprint:
    """Reads the headers and at most 1.5 MiB, whatever the size of the model: the same for a folder and a copy of it."""
    tensors = stored_tensors(folder)
    names = sorted(tensors)
    layout = json.dumps([(name, tensors[name].dtype, tensors[name].shape) for name in names])
    samples = {name: _sample(tensors[name]) for name in sampled(names)}
    return Fingerprint(hashlib.sha256(layout.encode()).hexdigest()[:16], samples)


def sampled(names: Iterable[str]) -> list[str]:
    """Some tensors of every kind, evenly over the layers: a fine-tune of one kind of module alone is another base."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(names):
        kinds.setdefault(NUMBER.sub("*", name), []).append(name)
    each = max(1, SAMPLED_TENSORS // max(1, len(kinds)))
    taken = (kind[n * len(kind) // each] for kind in kinds.values() for n in range(each))
    return sorted(set(taken))


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
                fix=CONVERT,
            )
        )
    raise ModelError(
        Problem(f"no {WEIGHTS} and no {INDEX}", where=str(folder), fix="give a folder that `save_pretrained` wrote")
    )


def read_header(file: Path, most_bytes: int = LARGEST_HEADER_BYTES) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, from its header alone, which may have `most_bytes`.

    As safetensors itself demands, they fill the file from one end to the other, and each is as long as its shape says.
    """
    header, data = _header(file, most_bytes)
    try:
        tensors = {
            name: StoredTensor(
                file, entry["dtype"], tuple(entry["shape"]), *(data + offset for offset in entry["data_offsets"])
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
        end = data
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.end)):
            _check_place(tensor, end)
            end = tensor.end
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(file) from error
    if end > (size := file.stat().st_size):
        raise ModelError(Problem("the file ends in the middle of its data", where=str(file), fix=DAMAGED))
    if end < size:
        raise _unreadable(file, f": {size - end:,} bytes of the file belong to no tensor")
    return tensors


def read_metadata(file: Path) -> dict[str, str]:
    """The free text that a safetensors file carries."""
    found = _header(file, LARGEST_HEADER_BYTES)[0].get("__metadata__", {})
    if not (isinstance(found, dict) and all(isinstance(text, str) for text in found.values())):
        raise _unreadable(file)
    return found


def _header(file: Path, most_bytes: int) -> tuple[dict, int]:
    """The JSON header and the offset at which the data begins."""
    with file.open("rb") as stream:
        size = int.from_bytes(first := stream.read(8), "little")
        if first == LFS_POINTER:
            fix = "run `git lfs pull` where it was cloned"
            raise ModelError(Problem("it is a pointer of git-lfs, not the file itself", where=str(file), fix=fix))
        if size > file.stat().st_size:
            raise _unreadable(file, f": it claims {size:,} bytes")
        if size > most_bytes:
            raise SafetyError(Problem(f"its header has {size:,} bytes", where=str(file), fix=TOO_LARGE))
        text = stream.read(size)
    try:
        header = json.loads(text, object_pairs_hook=each_once)
    except (ValueError, RecursionError) as error:
        raise _unreadable(file) from error
    if not isinstance(header, dict):
        raise _unreadable(file)
    return header, 8 + size


def _check_place(tensor: StoredTensor, start: int) -> None:
    """ValueError unless the tensor begins at `start` and is as long as its shape says."""
    numbers = (*tensor.shape, tensor.start, tensor.end)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("sizes are whole numbers")
    bits = BITS[tensor.dtype] * prod(tensor.shape)
    if tensor.start != start or (tensor.end - tensor.start) * 8 != bits:
        raise ValueError("a tensor is not where or as large as the header says")


def _unreadable(file: Path, why: str = "") -> ModelError:
    return ModelError(Problem(f"its header can't be read{why}", where=str(file), fix=DAMAGED))


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if isinstance(found, dict) and found and all(isinstance(file, str) for file in found.values()):
        return found
    raise ModelError(Problem("its `weight_map` can't be read", where=str(index), fix=DAMAGED))


def _inside(folder: Path, name: str) -> Path:
    if Path(name).suffix != ".safetensors":
        what = f"the index names a file that is no safetensors: {name!r}"
        raise SafetyError(Problem(what, where=str(folder / INDEX), fix=CONVERT))
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
