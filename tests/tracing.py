"""Every system call by which a forked process changes a folder, one of them failing or being the last thing it does.

What `strace -e inject` does, through the same ptrace: below Python and Rust alike, so that no write escapes, and with no
hook in the program. strace would start the program anew for each of the hundreds of faults; this takes it where its
imports are done. Linux on x86-64 alone.
"""

import ctypes
import os
import platform
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

AVAILABLE = sys.platform == "linux" and platform.machine() == "x86_64"

TRACEME, PEEKUSER, POKEUSER, SYSCALL, SETOPTIONS = 0, 3, 6, 24, 0x4200
SYSGOOD, EXITKILL = 1, 0x100000
CALL = signal.SIGTRAP | 0x80  # how a stop at a system call is told from others
NUMBER, RESULT = 15 * 8, 10 * 8  # places in `struct user`: orig_rax, rax
ARGUMENTS = (14 * 8, 13 * 8, 12 * 8, 7 * 8)  # rdi, rsi, rdx, r10
HERE = -100  # AT_FDCWD
KILL = "KILL"
LOST = "LOST"  # a disk that says it has written, and has not


@dataclass(frozen=True)
class Kind:
    """A system call on files, and which of its arguments say where."""

    name: str
    descriptor: int | None = None
    folder: int | None = None
    path: int | None = None
    flags: int | None = None


CHANGES = {
    1: Kind("write", descriptor=0),
    2: Kind("open", path=0, flags=1),
    18: Kind("pwrite", descriptor=0),
    20: Kind("writev", descriptor=0),
    74: Kind("fsync", descriptor=0),
    75: Kind("fdatasync", descriptor=0),
    77: Kind("ftruncate", descriptor=0),
    82: Kind("rename", path=0),
    83: Kind("mkdir", path=0),
    84: Kind("rmdir", path=0),
    87: Kind("unlink", path=0),
    90: Kind("chmod", path=0),
    257: Kind("openat", folder=0, path=1, flags=2),
    258: Kind("mkdirat", folder=0, path=1),
    263: Kind("unlinkat", folder=0, path=1),
    264: Kind("renameat", folder=0, path=1),
    316: Kind("renameat2", folder=0, path=1),
}

READS = {0: Kind("read", descriptor=0), 17: Kind("pread", descriptor=0)}


@dataclass(frozen=True)
class Call:
    name: str
    path: Path


@dataclass
class Traced:
    """A process that has called `stand_still`, followed until it ends."""

    pid: int
    below: Path  # calls elsewhere don't count
    kinds: Mapping[int, Kind] = field(default_factory=lambda: CHANGES)
    of: Callable[[Call], bool] = lambda call: True  # nor do others
    calls: list[Call] = field(default_factory=list)

    def run(self, at: int = 0, fault: int | str = KILL) -> int:
        """Let it go on; call `at` (from 1) fails with the errno `fault`, is the last, or lies. Its exit code, negative for a
        signal."""
        os.waitpid(self.pid, 0)
        _ptrace(SETOPTIONS, self.pid, 0, SYSGOOD | EXITKILL)
        entering, answer, sent = True, None, 0
        while True:
            with suppress(ProcessLookupError):
                _ptrace(SYSCALL, self.pid, 0, sent)
            _, status = os.waitpid(self.pid, 0)
            if not os.WIFSTOPPED(status):
                return os.waitstatus_to_exitcode(status)
            if (stop := os.WSTOPSIG(status)) != CALL:
                sent = stop
                continue
            sent = 0
            if entering and (call := self._call()):
                self.calls.append(call)
                if len(self.calls) == at:
                    answer = self._strike(fault)
            elif not entering and answer is not None:
                _ptrace(POKEUSER, self.pid, RESULT, answer)
                answer = None
            entering = not entering

    def _strike(self, fault: int | str) -> int | None:
        if fault == KILL:
            os.kill(self.pid, signal.SIGKILL)
            return None
        answer = self._argument(2) if fault == LOST else -int(fault)
        _ptrace(POKEUSER, self.pid, NUMBER, -1)  # the kernel does nothing; the answer is put in when it leaves
        return answer

    def _call(self) -> Call | None:
        kind = self.kinds.get(_ptrace(PEEKUSER, self.pid, NUMBER))
        if kind is None or (kind.flags is not None and not self._argument(kind.flags) & (os.O_WRONLY | os.O_RDWR)):
            return None
        path = self._path(kind)
        if path is None or not path.is_relative_to(self.below):
            return None
        call = Call(kind.name, path)
        return call if self.of(call) else None

    def _path(self, kind: Kind) -> Path | None:
        if kind.descriptor is not None:
            return self._descriptor(self._argument(kind.descriptor))
        folder = HERE if kind.folder is None else ctypes.c_int(self._argument(kind.folder)).value
        start = Path(os.readlink(f"/proc/{self.pid}/cwd")) if folder == HERE else self._descriptor(folder)
        return start / self._text(self._argument(kind.path)) if start else None

    def _descriptor(self, number: int) -> Path | None:
        try:
            return Path(os.readlink(f"/proc/{self.pid}/fd/{number}"))
        except OSError:
            return None

    def _text(self, address: int) -> str:
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
            found = b""
            while b"\0" not in found:
                memory.seek(address + len(found))
                found += memory.read(256 - (address + len(found)) % 256)  # never across the end of a page
        return os.fsdecode(found.split(b"\0")[0])

    def _argument(self, place: int) -> int:
        return _ptrace(PEEKUSER, self.pid, ARGUMENTS[place])


def stand_still() -> None:
    """In the forked process: wait here for the one that follows it."""
    _ptrace(TRACEME, 0, 0, 0)
    os.kill(os.getpid(), signal.SIGSTOP)


def _ptrace(request: int, pid: int, address: int = 0, data: int = 0) -> int:
    ctypes.set_errno(0)
    found = _libc().ptrace(request, pid, ctypes.c_void_p(address), ctypes.c_void_p(data & (2**64 - 1)))
    if found == -1 and (code := ctypes.get_errno()):
        raise OSError(code, os.strerror(code))
    return found


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.restype = ctypes.c_long
    return libc
