"""Faults put into a run from outside: commands in forked processes that can be killed, and functions that fail on cue.

The heavy imports happen once, here; a forked command starts in milliseconds, so that kills come by the dozen.
"""

import gc
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from lora_cli.train.checkpoint import fault_of

SECONDS = 120  # that nothing here takes
HEAVY = (
    "lora_cli.cli.train",
    "lora_cli.runs.train",
    "transformers.optimization",
)  # what `lora train` imports on its way


@dataclass(frozen=True)
class Forked:
    """A `lora` command in a process of its own; what it says goes to `log`."""

    pid: int
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def announced(self) -> int:
        """The last step that it said it had saved."""
        return max(map(int, re.findall(r"^saved step (\d+)$", self.said, re.MULTILINE)), default=0)

    def kill(self, number: int = signal.SIGKILL) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code, negative where a signal ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Returns when it is ready, or has ended."""
        deadline = time.monotonic() + SECONDS
        while not ready() and not os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            assert time.monotonic() < deadline, self.said
            time.sleep(0.004)


def forked(*arguments: object, log: Path, before: Callable[[], None] = lambda: None) -> Forked:
    """Start the command; `before` runs in its process first, and may put faults into it."""
    from lora_cli.cli.main import main

    for name in HEAVY:
        import_module(name)

    def command() -> None:
        sys.argv = ["lora", *map(str, arguments)]
        before()
        main()

    return in_fork(command, log=log)


def in_fork(body: Callable[[], None], *, log: Path) -> Forked:
    """Start a function in a process of its own: exit code 0 where it returns, 1 where it raises."""
    log.write_text("")
    gc.freeze()  # else the child's collector touches, and so copies, all there is
    pid = os.fork()
    if pid:
        return Forked(pid, log)
    code = 1
    try:
        stream = log.open("w", buffering=1)
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        sys.stdout = sys.stderr = stream
        body()
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def assert_whole(checkpoints: Path, *, announced: int) -> None:
    """Every checkpoint that can be seen is good, and the newest is not older than the last one announced."""
    found = [folder for folder in checkpoints.glob("step-*") if folder.name.removeprefix("step-").isdigit()]
    assert {folder.name: fault_of(folder) for folder in found} == {folder.name: None for folder in found}
    newest = max((int(folder.name.removeprefix("step-")) for folder in found), default=0)
    assert newest >= announced


def at_call(number: int, function: Callable, act: Callable[[], None]) -> Callable:
    """The function, with `act` before its call of that number (from 1)."""
    calls = 0

    def wrapped(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return function(*arguments, **options)

    return wrapped


def send(number: int) -> Callable[[], None]:
    """A signal to this process itself."""
    return lambda: os.kill(os.getpid(), number)


def with_room_for(rows: int, objective: Callable) -> Callable:
    """The objective on a device that has memory for so many rows a forward."""

    def wrapped(model, batch):
        if len(batch["input_ids"]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return objective(model, batch)

    return wrapped
