"""What was tokenized once, kept in the user's cache folder under a key of everything that it was made from.

    <cache>/lora/rows/<key>/    the arrays of `examples.py`, and report.json, which is written last

An entry appears whole, by a rename, or not at all; one that is damaged is made anew. Of several processes that need the
same, one makes it while the others wait. It may be deleted at any time, also while a run has it mapped. When all of
them have more than MOST_BYTES, those that were not used for the longest time go.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lora_cli.data.encoder import tokenizer_fingerprint
from lora_cli.durable import DRAFT, draft_of
from lora_cli.errors import Problem, StorageError, first_line

try:
    import fcntl
except ImportError:  # Windows: two processes may both make an entry; the first one stays
    fcntl = None

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

MOST_BYTES = 20 * 10**9
ABANDONED = 24 * 3600  # seconds after which a draft is nobody's any more
REPORT = "report.json"
T = TypeVar("T")


def user_cache() -> Path:
    """Where `lora` keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora"


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, which `make` fills where it is not there yet: whole or not at all."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder.parent))
    try:
        make(draft)
        draft.chmod(0o755)
        draft.rename(folder)
    except OSError:
        if not folder.is_dir():  # another process finished first
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def rows_cache() -> Path:
    return user_cache() / "rows"


def key_of(parts: Mapping[str, Any]) -> str:
    """A name for what is made of these parts by this code and these libraries."""
    made_by = {"code": _code(), **{name: version(name) for name in ("transformers", "tokenizers", "jinja2")}}
    return hashlib.sha256(json.dumps(made_by | parts, sort_keys=True).encode()).hexdigest()[:32]


def tokenizer_key(tokenizer: "PreTrainedTokenizerBase") -> list[object]:
    """All that decides how this tokenizer, with its chat template, turns text into tokens."""
    settings = {name: value for name, value in tokenizer.init_kwargs.items() if _is_setting(name, value)}
    files = [] if hasattr(tokenizer, "backend_tokenizer") else sorted(tokenizer.vocab_files_names)
    paths = [Path(str(tokenizer.init_kwargs.get(name))) for name in files]  # merges and models that no attribute shows
    rules = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()]
    return [type(tokenizer).__name__, tokenizer_fingerprint(tokenizer), settings, rules]


def kept(key: str, make: Callable[[Path], None], read: Callable[[Path], T]) -> T:
    """What `read` reads of the entry; where it is missing or damaged, `make` fills a folder for it first.

    `read` raises OSError, ValueError, KeyError or TypeError for an entry that is not whole. Where the cache cannot be
    written, what is made lives as long as it is mapped.
    """
    folder = rows_cache() / key
    if (found := _read(folder, read)) is not None:
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder.parent).close()
    except OSError as error:
        log.info("%s cannot be written (%s), so the tokenized rows are not kept", folder.parent, error.strerror)
        with tempfile.TemporaryDirectory(prefix="lora-", ignore_cleanup_errors=True) as draft:
            _fill(Path(draft), make)
            return read(Path(draft))
    with _locked(folder.with_suffix(".lock")):
        if (found := _read(folder, read)) is not None:
            return found
        for left in (folder, *folder.parent.glob(f"{DRAFT}{key}-*")):  # a damaged one, and what a killed process left
            shutil.rmtree(left, ignore_errors=True)
        draft = draft_of(folder)
        try:
            draft.mkdir()
            _fill(draft, make)
            found = read(draft)  # maps the files, wherever they are moved
            with suppress(OSError):  # another process was first
                draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    _prune(folder)
    return found


def size(folder: Path) -> int:
    """Bytes of all files below a folder; those that go meanwhile are not counted."""
    total = 0
    for file in folder.rglob("*"):
        with suppress(OSError):
            total += file.stat().st_size
    return total


def _read(folder: Path, read: Callable[[Path], T]) -> T | None:
    try:
        found = read(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.info("%s is damaged and is made anew: %s", folder, first_line(error))
        return None
    with suppress(OSError):  # of a cache that may only be read
        os.utime(folder / REPORT)  # when it was used last
    return found


def _fill(draft: Path, make: Callable[[Path], None]) -> None:
    try:
        make(draft)
    except OSError as error:
        what = f"the tokenized rows cannot be written: {error.strerror}"
        fix = "free some space, or let XDG_CACHE_HOME (or TMPDIR) name a folder on another disk"
        raise StorageError(Problem(what, where=str(draft.parent), fix=fix)) from error


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Held by one process at a time, and let go with it, however it ends."""
    with file.open("a") as opened:
        if fcntl is not None:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                log.info("another process tokenizes the same rows: waiting for it")
                fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def _prune(newest: Path) -> None:
    """Removes what was not used for the longest time, and drafts that nobody finished."""
    used: list[tuple[float, Path]] = []
    for folder in newest.parent.iterdir():
        with suppress(OSError):
            if folder.name.startswith(DRAFT) and folder.stat().st_mtime < time.time() - ABANDONED:
                shutil.rmtree(folder, ignore_errors=True)
            elif folder.is_dir() and not folder.name.startswith(DRAFT) and folder != newest:
                used.append(((folder / REPORT).stat().st_mtime, folder))
    total = size(newest)
    for _, folder in sorted(used, reverse=True):
        total += size(folder)
        if total > MOST_BYTES:
            shutil.rmtree(folder, ignore_errors=True)
            folder.with_suffix(".lock").unlink(missing_ok=True)


def _code() -> str:
    """A digest of the modules that make examples of rows, so that no change to them meets what older ones made."""
    folder, digest = Path(__file__).parent, hashlib.sha256()
    for file in [*sorted(folder.glob("*.py")), folder.parent / "recipe" / "template.py"]:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _is_setting(name: str, value: object) -> bool:
    """Whether an argument of a tokenizer changes its tokens; where its files lie does not."""
    return isinstance(value, str | int | float | list | None) and name != "name_or_path" and not name.endswith("_file")
