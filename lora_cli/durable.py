"""Files that are old or new after a crash, never in between: written beside their place, forced to disk, then renamed.

.tmp-…   a draft, not there yet        .del-…   on its way out        both are swept at the next start
"""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DRAFT = ".tmp-"
DOOMED = ".del-"

# What file systems answer that know no fsync
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


def write_synced(file: Path, content: bytes) -> None:
    """Write a new file and force it to disk; its mode follows the umask."""
    with naming(file), file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        sync(stream.fileno())


def replace_file(file: Path, content: bytes) -> None:
    """Give a file another content, whole or not at all."""
    draft = draft_of(file)
    try:
        write_synced(draft, content)
        draft.replace(file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_path(file.parent)


def draft_of(path: Path) -> Path:
    """A name beside `path` that no other process takes."""
    return path.with_name(f"{DRAFT}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")


def remove(path: Path) -> None:
    """Delete a file or folder so that it is there whole or gone; what a link points to stays."""
    doomed = path.with_name(f"{DOOMED}{path.name}-{secrets.token_hex(4)}")
    path.rename(doomed)
    _delete(doomed)


def move_into(draft: Path, folder: Path, *, last: str) -> None:
    """Put the files of a draft into a folder, each whole or not at all; `last` is the one that makes the others count."""
    names = sorted(file.relative_to(draft) for file in draft.rglob("*") if file.is_file())
    names.sort(key=lambda name: name == Path(last))
    for name in names:
        sync_path(draft / name)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (draft / name).replace(folder / name)
    sync_path(folder)
    _delete(draft)


def sweep(folder: Path) -> None:
    """Delete the drafts and doomed entries that killed processes left in `folder`; only for who holds its lock."""
    if folder.is_dir():
        for entry in folder.iterdir():
            if entry.name.startswith((DRAFT, DOOMED)):
                _delete(entry)


def sync_path(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            sync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error say which file it is about: of a write or an fsync the system knows a number alone."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sync(descriptor: int) -> bool:
    """fsync; False where the file system has none, so that a crash of the machine may cost what was written."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
        return False
    return True


def can_sync(folder: Path) -> bool:
    """Whether what is written to `folder` can be forced to disk."""
    if os.name == "nt":
        return True
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        return sync(descriptor)
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)  # follows no links
    else:
        path.unlink()
