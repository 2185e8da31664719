"""SIGINT, SIGTERM and SIGUSR1: the first asks to stop, the second leaves at once.

`with raised():`            the first raises Interruption where the program stands; blocks clean up behind it
`with noted(…) as signals:` the first is noted, for a loop that has something to save and asks between two steps
"""

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
GRACE_SECONDS = 25  # torchrun and Slurm kill after 30
LATE = "not done within the grace time: leaving now; the last checkpoint stands\n"


class Interruption(BaseException):
    """A signal asked to stop. Not an Exception, so that nothing on the way takes it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def code(self) -> int:
        return exit_code(self.number)


def exit_code(number: int) -> int:
    """130 for SIGINT; 143 for the others, which schedulers send to say that time is up."""
    return 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


@contextmanager
def raised() -> Iterator[None]:
    """Signals raise Interruption inside the block."""

    def handle(number: int, frame: object) -> None:
        raise Interruption(number)

    with _handled_by(handle):
        yield


class Noted:
    """`received` is the number of the first signal, or None."""

    def __init__(self) -> None:
        self.received: int | None = None


@contextmanager
def noted(grace_seconds: float = GRACE_SECONDS) -> Iterator[Noted]:
    """Signals are noted inside the block; a second one, or the end of the grace time, ends the process.

    A thread of its own sees to that, for the main one may be deep in a kernel for long.
    """
    signals = Noted()
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    watch = threading.Thread(target=_watch, args=(ours, signals, grace_seconds), daemon=True)
    with ours, theirs, _handled_by(lambda number, frame: None, theirs.fileno()):
        watch.start()
        try:
            yield signals
        finally:
            theirs.shutdown(socket.SHUT_RDWR)
            watch.join()


def _watch(wakeups: socket.socket, signals: Noted, grace_seconds: float) -> None:
    """Reads the number of each signal as it comes; nothing to read means that the block has ended."""
    deadline = None
    while True:
        left = None if deadline is None else max(0, deadline - time.monotonic())
        if not select.select([wakeups], [], [], left)[0]:
            os.write(2, LATE.encode())
            os._exit(exit_code(signals.received))
        received = wakeups.recv(64)
        if not received:
            return
        for number in (number for number in received if number in NUMBERS):
            if signals.received is not None:
                os._exit(exit_code(signals.received))
            signals.received, deadline = number, time.monotonic() + grace_seconds


@contextmanager
def _handled_by(handler: Callable[[int, object], None], wakeup: int = -1) -> Iterator[None]:
    """Signals reach Python in the main thread alone; in any other the block changes nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in NUMBERS}
    wakeup_before = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for number, handler_before in before.items():
            signal.signal(number, signal.SIG_DFL if handler_before is None else handler_before)
