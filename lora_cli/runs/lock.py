"""One writer a run folder: a lock that the kernel takes back when its process ends, however it ends.

The file says who holds it. It is never inherited by programs that are started meanwhile.
"""

import errno
import json
import logging
import os
import shlex
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from lora_cli.errors import Problem, StorageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

log = logging.getLogger(__name__)

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
COMMAND = "LORA_COMMAND"  # what a launcher was started with: its workers' own arguments are others
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def command() -> str:
    """What the user typed, to type again."""
    program = ["python", "-m", "lora_cli"] if Path(sys.argv[0]).name == "__main__.py" else ["lora"]
    return os.environ.get(COMMAND) or shlex.join([*program, *sys.argv[1:]])


def command_to_resume() -> str:
    """The same, with `--resume`."""
    return resuming(shlex.split(command()))


def resuming(words: Iterable[str]) -> str:
    """The command that goes on with the run of another one."""
    kept = [word for word in words if word not in ("--resume", "--overwrite")]
    return shlex.join([*kept, "--resume"])


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the file for this process alone, and write into it who we are. StorageError where another one has it."""
    descriptor = _open(file)
    try:
        holder = _me() | {"started": datetime.now(UTC).isoformat(timespec="seconds"), "command": command()}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(holder, indent=1) + "\n").encode(), 0)
        yield
    finally:
        os.close(descriptor)


def check_free(file: Path) -> None:
    """Raise StorageError where a process holds the file; nothing is written."""
    if file.exists():
        os.close(_open(file))


def check_ours(file: Path) -> None:
    """Raise StorageError where the file names another process: not every network file system keeps locks."""
    holder = _read(file)
    if any(holder.get(key) != value for key, value in _me().items()):
        raise _taken(file)


def _open(file: Path) -> int:
    """A descriptor that holds the lock of the file that has this name now, and not of one that has just been moved."""
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)  # a run that could not start may just have removed it
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is None:
                log.warning("this system has no file locks: nothing keeps a second run out of %s", file.parent)
                return descriptor
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise _taken(file) from error
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
            log.warning("%s has no file locks: nothing keeps a second run out of it", file.parent)
            return descriptor
        os.close(descriptor)


def _me() -> dict[str, object]:
    """This process, and no other that is alive."""
    boot = BOOT_ID.read_text().strip() if BOOT_ID.is_file() else None
    return {"process": os.getpid(), "host": socket.gethostname(), "boot": boot}


def _read(file: Path) -> dict:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _taken(file: Path) -> StorageError:
    holder = _read(file)
    who = "unknown"
    if holder:
        who = f"process {holder.get('process')} on {holder.get('host')}, since {holder.get('started')}"
    return StorageError(
        Problem(
            f"another run is writing here: {who}",
            where=str(file.parent),
            line=str(holder.get("command", "")),
            fix="wait for it, or give another folder with `--out`",
        )
    )
