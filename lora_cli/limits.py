"""Bounds on what foreign files make this process do: sizes that are checked, and work that is cut off.

Processor time is bounded in the main thread, where the system has interval timers; memory where it has /proc (Linux).
"""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from lora_cli.errors import ModelError, Problem, SafetyError

try:
    import resource
except ImportError:  # Windows
    resource = None

Result = TypeVar("Result")

AGAIN = 0.1  # seconds after which the timer fires once more: what is raised inside a destructor is lost
MOST_JSON_BYTES = 20_000_000  # an index of 50,000 tensors has 5 MB, Gemma 3's tokenizer_config.json 1.2 MB
DAMAGED = "download it again: it is damaged"
TOO_LARGE = "no such file needs that; if it came from elsewhere, don't use it"


class Exceeded(Exception):
    """A bound was reached; the message names it: `2 s of processor time`."""


class _OutOfTime(BaseException):
    """Raised by the timer: no `except Exception` of the code that is cut off may swallow it."""


def bounded(work: Callable[[], Result], *, seconds: float, most_bytes: int) -> Result:
    """What `work` returns, if it takes no more processor time, and no more memory beyond what is held now.

    Raises Exceeded. Costs some 20 microseconds. Not for use inside itself.
    """
    try:
        with _within(most_bytes):
            return _timed(work, seconds)
    except _OutOfTime:
        _disarm()
        raise Exceeded(f"{seconds:g} s of processor time") from None
    except MemoryError:
        raise Exceeded(f"{most_bytes / 1e9:g} GB of memory") from None


def read_json(file: Path, *, most_bytes: int = MOST_JSON_BYTES, fix: str = DAMAGED) -> dict[str, Any]:
    """The object in a JSON file from elsewhere. Raises ModelError for what is none, SafetyError for one too large.

    A file that is not there is a FileNotFoundError, for only the caller knows what that means.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise SafetyError(
                Problem(
                    f"it is larger than {most_bytes:,} bytes", where=str(file), fix="don't use files that hold this"
                )
            )
        found = json.loads(content.decode("utf-8-sig"), object_pairs_hook=each_once)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ModelError(Problem(f"it can't be read: {error.strerror}", where=str(file), fix=fix)) from error
    except RecursionError as error:
        raise ModelError(Problem("it is no JSON: nested too deeply", where=str(file), fix=fix)) from error
    except ValueError as error:
        raise ModelError(Problem(f"it is no JSON: {error}", where=str(file), fix=fix)) from error
    if not isinstance(found, dict):
        raise ModelError(Problem("it is no JSON object", where=str(file), fix=fix))
    return found


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two values of one name, which is meant depends on the reader."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


_armed = threading.Event()  # a signal may come when the work is done already: it then does nothing


def _timed(work: Callable[[], Result], seconds: float) -> Result:
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        return work()
    if signal.getsignal(signal.SIGPROF) is not _out_of_time:
        signal.signal(signal.SIGPROF, _out_of_time)
    try:
        _armed.set()
        signal.setitimer(signal.ITIMER_PROF, seconds, AGAIN)
        return work()
    finally:
        _disarm()


def _disarm() -> None:
    _armed.clear()
    signal.setitimer(signal.ITIMER_PROF, 0)


def _out_of_time(*_: object) -> None:
    if _armed.is_set():
        raise _OutOfTime


def _within(most_bytes: int):
    held = _address_space()
    return nullcontext() if held is None else _limited(held + most_bytes)


@contextmanager
def _limited(most_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    unlimited = soft == resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes if unlimited else min(soft, most_bytes), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int | None:
    """Bytes that this process has mapped; None where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
