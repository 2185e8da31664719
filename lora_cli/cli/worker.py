"""What a process asks and does as one of several workers. Every command asks it first, so nothing heavy is imported here."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from lora_cli.errors import UserError
from lora_cli.signals import Interruption

LAUNCHER = "LORA_LAUNCHER"  # its process
ERRORS = "LORA_ERRORS"  # names the folder where our workers leave their errors
HANG = "hang"  # the error file that is no worker's own
AGAIN = "again"  # what workers leave that want to be started again
PR_SET_PDEATHSIG = 1


def is_worker() -> bool:
    return "RANK" in os.environ


def is_first_worker() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def error_file() -> Path | None:
    """Where a worker of ours writes its error: the launcher shows one of them, that of the worker that failed first."""
    folder = os.environ.get(ERRORS)
    return Path(folder) / os.environ["RANK"] if folder and is_worker() else None


def end_with_launcher() -> None:
    """Let a worker of ours get SIGTERM when its launcher dies, be it by SIGKILL; on Linux."""
    if error_file() and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if str(os.getppid()) != os.environ.get(LAUNCHER):  # it died before
            raise Interruption(signal.SIGTERM)


def leave_hanging(error: UserError, doomed: list[int]) -> NoReturn:
    """Where workers wait for one that hangs or can't go on: say so, end those that would not hear anything less, and leave."""
    from lora_cli.durable import replace_file
    from lora_cli.train.memory import StartAgain

    if file := error_file():
        with suppress(OSError):
            if isinstance(error, StartAgain):
                replace_file(file.with_name(AGAIN), error.as_json().encode())
            else:
                file.with_name(HANG).write_text(str(error), encoding="utf-8")
    else:
        print(error, file=sys.stderr, flush=True)
    for process in doomed:
        with suppress(OSError):
            os.kill(process, signal.SIGKILL)
    os._exit(error.code)  # the main thread is the one that waits
