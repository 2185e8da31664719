"""An adapter that was made and not trained, as a folder: PEFT's two files, the tokenizer, and where it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lora_cli import __version__
from lora_cli.errors import Problem, StorageError
from lora_cli.export.files import copy_side_files
from lora_cli.export.staging import staged
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.algebra import Fits
from lora_cli.lora.peft_format import load_adapter, save_adapter


@dataclass(frozen=True)
class Written:
    """Where an adapter was written, and how large it is."""

    out: Path
    bytes: int
    parameters: int
    sha256: str


@dataclass(frozen=True)
class Made:
    """An adapter that was made, where it was written, and how far each module is from what was asked for."""

    adapter: Adapter
    written: Written
    fits: Fits
    base_differences: tuple[str, ...] = ()


def write_adapter(adapter: Adapter, out: Path, *, tokenizer: Path | None, transposed: bool) -> Written:
    """Write the folder whole or not at all, with the tokenizer's files of the folder `tokenizer`, and read it back.

    Raises DivergedError for an adapter that does nothing, StorageError for the output.
    """
    adapter.check_alive()
    with staged(out) as draft:
        fill(draft, adapter, tokenizer=tokenizer, transposed=transposed)
        size = bytes_of(draft)
    return Written(out, size, adapter.parameters, adapter.digest())


def fill(draft: Path, adapter: Adapter, *, tokenizer: Path | None, transposed: bool) -> Adapter:
    """Write an adapter and a tokenizer into a folder; returns what was read back, which is the same."""
    save_adapter(adapter, draft, transposed=transposed)
    if tokenizer is not None:
        copy_side_files(tokenizer, draft)
    read = load_adapter(draft)
    check_same(adapter, read)
    return read


def bytes_of(folder: Path) -> int:
    """Of the files in it."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def check_same(written: Adapter, read: Adapter) -> None:
    """float32 factors come back as they went, bit for bit."""
    if read.digest() != written.digest():
        raise StorageError(Problem("what was written does not read back the same", fix="check the disk, and try again"))


def made_by(command: str, adapter: Adapter, parents: list[Mapping[str, object]], **settings: object) -> Adapter:
    """The adapter with its origin, which travels in the file's metadata: the command, its settings and its parents."""
    origin = {"command": command, "lora": __version__, "parents": parents, **settings}
    return replace(adapter, origin=origin)
