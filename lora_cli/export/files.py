"""A copy of a model folder in which some weights are replaced, written one tensor at a time.

Memory holds one tensor, whatever the size of a shard: a safetensors file's header is known before its data
(8 bytes of length, JSON, then the bytes), so the data can be streamed. Unchanged tensors are copied byte for byte.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_cli.errors import ModelError, Problem, SafetyError
from lora_cli.limits import read_json
from lora_cli.lora.base_files import INDEX, StoredTensor, read_header, read_metadata, stored_tensors, weight_files
from lora_cli.models.base import read_config
from lora_cli.models.load import tokenizer_folder
from lora_cli.models.trust import AUTO_MAP, CODE, may_run

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
COPIED_BYTES = 16 * 2**20
CONFIG = "config.json"
TOKENIZER_FILES = (
    "tokenizer*.json", "tokenizer.model*", "*.tiktoken", "tekken.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.*",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
OTHER_FILES = ("generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")

Edit = Callable[[Tensor, torch.dtype], Tensor]
"""(weight [out, in] as stored, of experts [experts, out, in], dtype to store in) -> the new weight in that dtype."""
Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)"""


@dataclass(frozen=True)
class Change:
    """A tensor that is written for a stored one: the weight that `edit` makes of it, or the same again, under `name`."""

    name: str
    edit: Edit | None = None
    transposed: bool = False
    rows: int | None = None  # of the new tensor, where they are not as many as those of the stored one


Changes = Mapping[str, Sequence[Change]]
"""What becomes of stored tensors, by name: several (the embedding, and the head that was tied to it), or nothing."""


@dataclass(frozen=True)
class _Piece:
    """One tensor to be written: its name, and how its bytes come from the source."""

    name: str
    source: StoredTensor
    dtype: str
    edit: Edit | None = None
    transposed: bool = False
    rows: int | None = None
    new: Tensor | None = None  # what is written instead, where the source has no such tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape if self.rows is None else (self.rows, *self.source.shape[1:])


def rewrite_weights(
    folder: Path,
    out: Path,
    changes: Changes,
    *,
    added: Mapping[str, Tensor] = MappingProxyType({}),
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> int:
    """Write all weights of `folder` into `out`, in the same shards; returns the bytes of the tensors.

    `dtype` is for all floating tensors; without it each keeps its own. `added` come to those of the last shard.
    """
    files = weight_files(folder)
    total = sum(tensor.end - tensor.start for tensor in stored_tensors(folder).values())
    done, written = 0, {}
    for file in files:
        pieces = [
            piece for name, tensor in read_header(file).items() for piece in _pieces(name, tensor, changes, dtype)
        ]
        pieces += _new_pieces(added, folder, dtype) if file == files[-1] else []
        # Wide types first keeps every tensor aligned, as safetensors itself writes them
        pieces.sort(key=lambda piece: -_width(piece))
        with file.open("rb") as source, (out / file.name).open("wb") as target:
            target.write(_header(pieces, read_metadata(file)))
            for piece in pieces:
                target.writelines(_bytes(piece, source))
                done += piece.source.end - piece.source.start
                if progress:
                    progress(min(done, total), total)
        _check_written(out / file.name, pieces)
        written |= {piece.name: (file.name, _size(piece)) for piece in pieces}
    if (folder / INDEX).is_file():
        _write_index(folder, out, written)
    return sum(size for _, size in written.values())


def copy_side_files(folder: Path, out: Path, *, tokenizer: Path | None = None) -> None:
    """Tokenizer, chat template, generation config and licence: never pickles, weights in other formats, or code but that
    which the user trusts.

    The tokenizer is all from `tokenizer` (the run folder) where that has one, else all from `folder`.
    """
    _copy(folder, out, (*OTHER_FILES, CODE) if may_run(folder) else OTHER_FILES)
    _copy(tokenizer_folder(tokenizer, folder), out, TOKENIZER_FILES)


def write_config(
    folder: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    tied: bool | None = None,
    changed: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """config.json with what changed: the dtype (it would be loaded in the old one), whether the head is tied, and more."""
    config = read_config(folder)
    if not may_run(folder):
        config.pop(AUTO_MAP, None)  # it would name code files that are not copied
    if tied is not None:
        config["tie_word_embeddings"] = tied
    if dtype is not None:
        _set_dtype(config, dtype_name(dtype))
    config |= changed
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def planned_bytes(
    folder: Path,
    changes: Changes,
    dtype: torch.dtype | None = None,
    added: Mapping[str, Tensor] = MappingProxyType({}),
) -> int:
    """Bytes that `rewrite_weights` will write."""
    tensors = stored_tensors(folder).items()
    pieces = [piece for name, tensor in tensors for piece in _pieces(name, tensor, changes, dtype)]
    return sum(map(_size, [*pieces, *_new_pieces(added, folder, dtype)]))


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> bfloat16"""
    return str(dtype).removeprefix("torch.")


def read_weight(tensor: StoredTensor, *, transposed: bool = False) -> Tensor:
    """One tensor of the files in memory, as [out, in]."""
    with tensor.file.open("rb") as stream:
        return _read(tensor, stream, transposed)


def row_blocks(weight: Tensor, elements: int = 2**22) -> Iterator[slice]:
    """Slices of rows of about `elements` numbers, so that what is computed beside a weight stays small."""
    step = max(1, elements // max(1, weight[0].numel()))
    return (slice(row, row + step) for row in range(0, len(weight), step))


def _check_written(file: Path, pieces: list["_Piece"]) -> None:
    """safetensors itself must find the file whole, with every tensor in it."""
    try:
        with safe_open(file, framework="pt") as opened:
            missing = {piece.name for piece in pieces} ^ set(opened.keys())
    except SafetensorError as error:
        raise OSError(f"what was written can't be read back: {error}") from error
    if missing:
        raise OSError(f"what was written lacks {sorted(missing)[0]}")


def _pieces(name: str, tensor: StoredTensor, changes: Changes, dtype: torch.dtype | None) -> list[_Piece]:
    stored = DTYPE_NAMES[dtype] if dtype is not None and tensor.dtype in DTYPES else tensor.dtype
    return [
        _Piece(change.name, tensor, stored, change.edit, change.transposed, change.rows)
        for change in changes.get(name, (Change(name),))
    ]


def _new_pieces(added: Mapping[str, Tensor], folder: Path, dtype: torch.dtype | None) -> list[_Piece]:
    """In the dtype asked for, else in the one that most of the folder's bytes have."""
    if not added:
        return []
    sizes: Counter[str] = Counter()
    for tensor in stored_tensors(folder).values():
        sizes[tensor.dtype] += (tensor.end - tensor.start) * (tensor.dtype in DTYPES)
    name = DTYPE_NAMES[dtype] if dtype is not None else sizes.most_common(1)[0][0]
    stored = {path: tensor.to(DTYPES[name]) for path, tensor in added.items()}
    return [
        _Piece(path, StoredTensor(folder, name, tuple(new.shape), 0, new.numel() * new.itemsize), name, new=new)
        for path, new in stored.items()
    ]


def _bytes(piece: _Piece, source: BinaryIO) -> Iterator[memoryview | bytes]:
    if piece.new is not None:
        return iter([_memory(piece.new)])
    if piece.edit is None and piece.dtype == piece.source.dtype:
        return _copied(piece.source, source)
    weight = _read(piece.source, source, piece.transposed)
    dtype = DTYPES[piece.dtype]
    new = weight.to(dtype) if piece.edit is None else piece.edit(weight, dtype)
    _check_finite(piece, weight, new)
    new = new.mT if piece.transposed else new
    return iter([_memory(new)])


def _memory(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _copied(tensor: StoredTensor, source: BinaryIO) -> Iterator[bytes]:
    source.seek(tensor.start)
    left = tensor.end - tensor.start
    while left:
        chunk = source.read(min(COPIED_BYTES, left))
        if not chunk:
            raise ModelError(_cut_off(tensor))
        left -= len(chunk)
        yield chunk


def _read(tensor: StoredTensor, source: BinaryIO, transposed: bool) -> Tensor:
    data = bytearray(tensor.end - tensor.start)
    source.seek(tensor.start)
    if source.readinto(data) != len(data):
        raise ModelError(_cut_off(tensor))
    dtype = DTYPES[tensor.dtype]
    weight = torch.frombuffer(data, dtype=dtype).view(tensor.shape) if data else torch.empty(tensor.shape, dtype=dtype)
    return weight.mT if transposed else weight


def _check_finite(piece: _Piece, old: Tensor, new: Tensor) -> None:
    if not new.isfinite().all() and old.isfinite().all():
        raise ModelError(
            Problem(
                f"{piece.name} has values that {dtype_name(new.dtype)} can't hold "
                f"(beyond {torch.finfo(new.dtype).max:,.0f})",
                where=str(piece.source.file),
                fix="take `--dtype bfloat16` or `--dtype float32`",
            )
        )


def _header(pieces: list[_Piece], metadata: Mapping[str, str]) -> bytes:
    header: dict = {"__metadata__": dict(metadata) or {"format": "pt"}}
    offset = 0
    for piece in pieces:
        header[piece.name] = {
            "dtype": piece.dtype,
            "shape": list(piece.shape),
            "data_offsets": [offset, offset + _size(piece)],
        }
        offset += _size(piece)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _width(piece: _Piece) -> int:
    """Bytes an element; 0 for empty tensors and for types narrower than a byte, which go last."""
    return DTYPES[piece.dtype].itemsize if piece.dtype in DTYPES else _source_width(piece.source)


def _source_width(tensor: StoredTensor) -> int:
    return (tensor.end - tensor.start) // max(1, torch.Size(tensor.shape).numel())


def _size(piece: _Piece) -> int:
    """Bytes of the tensor as it is written."""
    if piece.dtype == piece.source.dtype and piece.shape == piece.source.shape:
        return piece.source.end - piece.source.start
    return DTYPES[piece.dtype].itemsize * torch.Size(piece.shape).numel()


def _write_index(folder: Path, out: Path, written: Mapping[str, tuple[str, int]]) -> None:
    index = read_json(folder / INDEX)
    added = sum(size for name, (_, size) in written.items() if name not in index["weight_map"])
    metadata = found if isinstance(found := index.get("metadata"), dict) else {}
    metadata["total_size"] = sum(size for _, size in written.values())
    if added or len(written) < len(index["weight_map"]):
        metadata.pop("total_parameters", None)
    weight_map = {name: file for name, (file, _) in sorted(written.items())}
    (out / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n")


def _set_dtype(config: dict, name: str) -> None:
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = name
    for value in config.values():
        if isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value):
            _set_dtype(value, name)


def _copy(folder: Path, out: Path, patterns: tuple[str, ...]) -> None:
    for file in sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}):
        _refuse_link_out(file, folder)
        target = out / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def _refuse_link_out(file: Path, folder: Path) -> None:
    """The hub's cache links from snapshots/COMMIT into blobs beside it; a link to anywhere else is refused."""
    real, home = file.resolve(), folder.resolve()
    cache = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not real.is_relative_to(home) and not real.is_relative_to(cache):
        raise SafetyError(
            Problem(
                f"{file.name} is a link that leads out of its folder, to {real}",
                where=str(file),
                fix="put the file itself there",
            )
        )


def _cut_off(tensor: StoredTensor) -> Problem:
    return Problem(
        "the file ends in the middle of its data", where=str(tensor.file), fix="download it again: it is damaged"
    )
