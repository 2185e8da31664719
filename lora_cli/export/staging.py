"""An output folder that appears whole or not at all: written beside its place, forced to disk, then renamed."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_cli.durable import DRAFT, draft_of, sync_path
from lora_cli.errors import Problem, StorageError

try:
    import fcntl
except ImportError:  # Windows: leftovers of killed processes stay until they are deleted by hand
    fcntl = None


@contextmanager
def staged(out: Path, *, beside: Path | None = None) -> Iterator[Path]:
    """A fresh folder that becomes `out` when the block ends well, and vanishes when it does not.

    Raises StorageError when `out` holds anything, when it lies in `beside` (a folder that must not change), or when
    the disk fails.
    """
    refuse_output(out, beside)
    draft = out.parent / f"{_prefix(out)}{secrets.token_hex(4)}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        draft.mkdir()
        with _locked(draft):
            yield draft
            _flush(draft)
            draft.rename(out)
        sync_path(out.parent)
    except OSError as error:
        raise _storage(error, draft) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def staged_file(out: Path) -> Iterator[Path]:
    """As `staged`, for one file: the path to write to, which becomes `out`, in a folder that is made where there is none."""
    refuse_output(out)
    draft = draft_of(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        sync_path(draft)
        draft.rename(out)
        sync_path(out.parent)
    except OSError as error:
        raise _storage(error, draft) from error
    finally:
        with suppress(OSError):  # there is none
            draft.unlink()


def refuse_output(out: Path, beside: Path | None = None) -> None:
    """Raise StorageError for an output that exists or lies inside a folder that must not change."""
    if beside is not None and out.resolve().is_relative_to(beside.resolve()):
        raise StorageError(
            Problem(
                "the output would lie in a folder that must not change",
                where=str(out),
                fix="give another folder with `--out`",
            )
        )
    if out.is_file() or out.is_symlink() or (out.is_dir() and any(out.iterdir())):
        raise StorageError(
            Problem(
                "the output exists already", where=str(out), fix="give another folder with `--out`, or remove this one"
            )
        )


def need_space(folder: Path, needed: int) -> None:
    """Raise StorageError when the disk under `folder` has not `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            Problem(
                f"{needed:,} bytes are needed, {free:,} are free",
                where=str(folder.parent),
                fix="free space, or give `--out` on another disk",
            )
        )


def _storage(error: OSError, draft: Path) -> StorageError:
    fix = "free space, or take another `--out`; nothing was changed"
    return StorageError(Problem(f"{error.strerror or error}", where=str(error.filename or draft), fix=fix))


def _prefix(out: Path) -> str:
    return f"{DRAFT}{out.name}-"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder, so that no other process takes it for a leftover; the kernel lets go if we are killed."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _sweep(out: Path) -> None:
    """Delete what killed processes left of the same output."""
    if fcntl is None:
        return
    for leftover in out.parent.glob(f"{_prefix(out)}????????"):
        with suppress(OSError), _locked(leftover):
            shutil.rmtree(leftover)


def _flush(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        sync_path(path)
    sync_path(folder)
