"""Processes that look after each other: a run in which one hangs ends soon, and names the one and what each last did.

Each process counts what it does, and a thread of its own tells the others, through the store at which they met. They keep
step with each other; so where nothing moves, the one that has done least keeps the others waiting, or the one whose thread
is silent too: it is stopped, or deep in something that never returns.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Self, TypeVar

from torch import nn
from torch.distributed import DistStoreError, TCPStore

from lora_cli.errors import DistributedError, Problem, UserError, first_line
from lora_cli.lora.shards import InShards
from lora_cli.train.events import Event, Step
from lora_cli.train.memory import StartAgain

PATIENCE = "LORA_HANG_SECONDS"
DEFAULT_SECONDS = 120.0
# Times as long: where all have done the same, for nothing tells a hang from long work, such as a write to a slow disk;
# and until a first step is done
UNDECIDED = 5
FIRST_STEP = 5
FEW = 4  # that are named
DONE = 10**15
CALLED_OFF, KNOWN = "lora/watch/called-off", "lora/watch/known"  # why the run ends, and how many processes know
MOST_WAIT = 10.0  # seconds, until all of them know
LOOK = f"look at its machine, disk and GPU; continue with `--resume`; {PATIENCE} sets how long to wait"

T = TypeVar("T")

# Tells the error, ends these processes of this machine, and leaves at once
GiveUp = Callable[[UserError, list[int]], None]


def patience() -> float:
    """Seconds without a sign of life after which a run is given up."""
    try:
        return max(1.0, float(os.environ.get(PATIENCE, DEFAULT_SECONDS)))
    except ValueError:
        return DEFAULT_SECONDS


@dataclass(frozen=True)
class Beat:
    """What a process has done, in number and in words; `tick` is its thread's own count."""

    count: int
    tick: int
    did: str
    host: str
    pid: int


class Watch:
    """Inside the block this process tells what it does, and looks at the others once it waits for long.

    `give_up` is called on the thread, in every process that can still say something.
    """

    def __init__(self, rank: int, count: int, give_up: GiveUp, seconds: float | None = None) -> None:
        self.rank, self.ranks, self.give_up = rank, range(count), give_up
        self.seconds = seconds or patience()
        self.count, self.tick, self.did_last, self.moved = 0, 0, "nothing yet", time.monotonic()
        self.step, self.steps, self.forwards = 0, 0, 0  # the last step, the steps seen, the forwards since
        self.seen: dict[int, tuple[Beat, float, float]] = {}  # with when it last counted on, and when it last ticked
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Self:
        # a connection of its own: the other one may be waiting for an answer
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = TCPStore(
            host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=max(5.0, self.seconds / 4))
        )
        self._tell()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def did(self, what: str) -> None:
        self.count, self.did_last, self.moved = self.count + 1, what, time.monotonic()

    def note(self, event: Event) -> None:
        self.step, self.forwards = event.step, 0
        self.steps += isinstance(event, Step)
        self.did(f"step {event.step}" if isinstance(event, Step) else f"{event.name} at step {event.step}")

    def call_off(self, error: StartAgain) -> None:
        """Tell every process that this one can't go on while they wait for it; all of them give up, this one too."""
        self.store.set(CALLED_OFF, error.as_json())
        self.thread.join()

    def follow(self, task: nn.Module, meeting: Iterable[nn.Module] = ()) -> None:
        """Count the task's forwards, and the modules in them where each process waits for the others."""
        task.register_forward_pre_hook(self._forward)
        task.register_forward_hook(lambda *_: self.did(f"forward {self.forwards} after step {self.step}"))
        for module in meeting:
            module.register_forward_pre_hook(lambda *_: self.did(self.did_last), prepend=True)
            if isinstance(module, InShards):  # its run waits for the others before a hook on its forward is called
                module.run = self._counted(module.run)

    def _counted(self, run: Callable[..., T]) -> Callable[..., T]:
        def counted(*arguments: object) -> T:
            self.did(self.did_last)
            return run(*arguments)

        return counted

    def _forward(self, *_: object) -> None:
        self.forwards += 1
        self.did(f"the start of forward {self.forwards} after step {self.step}")

    def _run(self) -> None:
        every = min(1.0, self.seconds / 20)
        while not self.ended.wait(every):
            self.tick += 1
            try:
                self._tell()
                found = self._called_off() or self._look()
            except DistStoreError as error:
                found = self._lost(error), []
            except RuntimeError:  # the store has gone, and the run with it
                return
            if found and found[0]:
                self.give_up(*found)
                return
        self.count = DONE
        try:
            self._tell()
        except RuntimeError:
            return

    def _tell(self) -> None:
        beat = Beat(self.count, self.tick, self.did_last, socket.gethostname(), os.getpid())
        self.store.set(f"lora/watch/{self.rank}", json.dumps(asdict(beat)))

    def _called_off(self) -> tuple[UserError, list[int]] | None:
        """Returns once all know: the first one that leaves breaks the connections of the others."""
        if not self.store.check([CALLED_OFF]):
            return None
        error, deadline = StartAgain.from_json(self.store.get(CALLED_OFF)), time.monotonic() + MOST_WAIT
        with suppress(RuntimeError):  # the store goes with the process that keeps it, which knows by then
            self.store.add(KNOWN, 1)
            while self.store.add(KNOWN, 0) < len(self.ranks) and time.monotonic() < deadline:
                time.sleep(0.05)
        return error, []

    def _look(self) -> tuple[UserError, list[int]] | None:
        """The verdict, where there is one. Nobody is looked at while this process moves."""
        now = time.monotonic()
        waited = now - self.moved
        if waited < self._long() / 4:
            self.seen.clear()
            return None
        self._read(now)
        hung = self._hung(now) if waited >= self._long() else []
        undecided = len(hung) == len(self.seen)
        if not hung or (undecided and waited < UNDECIDED * self._long()):
            return None
        beats = {rank: beat for rank, (beat, _, _) in self.seen.items()}
        error = DistributedError(problem(hung, {rank: beat.did for rank, beat in beats.items()}, waited))
        others = [beats[rank] for rank in hung if rank != self.rank and not undecided]
        # a stopped process would not hear anything less than SIGKILL
        return error, [beat.pid for beat in others if beat.host == socket.gethostname()]

    def _long(self) -> float:
        """The first step loads kernels and libraries, and takes its time."""
        return self.seconds if self.steps else FIRST_STEP * self.seconds

    def _hung(self, now: float) -> list[int]:
        """The silent ones; else those that have done least, for as long as this process has looked at them."""
        at_work = {rank: found for rank, found in self.seen.items() if found[0].count != DONE}
        silent = [rank for rank, (_, _, ticked) in at_work.items() if now - ticked >= self._long() / 2]
        least = min(beat.count for beat, _, _ in self.seen.values())
        return silent or [
            rank
            for rank, (beat, counted, _) in at_work.items()
            if beat.count == least and now - counted >= self._long() / 2
        ]

    def _read(self, now: float) -> None:
        told = self.store.multi_get([f"lora/watch/{rank}" for rank in self.ranks])
        for rank, text in zip(self.ranks, told, strict=True):
            beat = Beat(**json.loads(text))
            before, counted, ticked = self.seen.get(rank, (beat, now, now))
            self.seen[rank] = (
                beat,
                counted if beat.count == before.count else now,
                ticked if beat.tick == before.tick else now,
            )

    def _lost(self, error: Exception) -> UserError | None:
        """The store is the first machine's, and does not answer."""
        if time.monotonic() - self.moved < self._long():
            return None
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        return DistributedError(
            Problem(f"worker 0 or its machine does not answer: {first_line(error)}", where=where, fix=LOOK)
        )


def problem(hung: list[int], did: dict[int, str], seconds: float) -> Problem:
    """Who hangs, and what each did last."""
    all_of_them = len(hung) == len(did)
    who = (
        "all workers wait for each other"
        if all_of_them
        else f"{_workers(hung)} {'hangs' if len(hung) == 1 else 'hang'}"
    )
    ordered = [*hung, *(rank for rank in did if rank not in hung)]
    said = "; ".join(f"worker {rank}: {did[rank]}" for rank in ordered[:FEW])
    more = f"; and {len(ordered) - FEW} more" if len(ordered) > FEW else ""
    return Problem(
        f"{who}: nothing has happened for {seconds:.0f} s",
        where=f"done last: {said}{more}",
        fix=LOOK,
    )


def _workers(ranks: list[int]) -> str:
    named = ", ".join(map(str, ranks[:FEW])) + (" …" if len(ranks) > FEW else "")
    return f"worker {named}" if len(ranks) == 1 else f"workers {named}"
