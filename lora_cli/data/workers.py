"""Chunks of rows tokenized in order, by this process alone or, where there is much to do, by one a core.

Workers are started once the rows that are left would keep this process busy for a while, and it goes on by itself
until they are ready: so a small file costs none, and a large one does not wait for them.

They talk over a pipe each, one chunk there and back: a worker whose pipe breaks has died, and a worker whose pipe ends
has lost this process, and ends too.
"""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, NamedTuple

from lora_cli.data.examples import Arrays
from lora_cli.data.tokenizing import Chunk, How, Made, Tokenizing
from lora_cli.errors import OutOfMemoryError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Result = tuple[Chunk, Made, Arrays]

ALONE = 6_000_000  # characters of rows that this process does not need help with
MOST_WORKERS = 32
AHEAD = 4  # chunks a worker that may be done before their turn


class Worker(NamedTuple):
    process: BaseProcess
    pipe: Connection


def tokenized(
    chunks: Iterable[Chunk], tokenizer: "PreTrainedTokenizerBase", how: How, left: Callable[[], float]
) -> Iterator[Result]:
    """Each chunk with what was made of it, in order; `left` says how many characters of rows are still to come."""
    work, chunks = Tokenizing(tokenizer, how), iter(chunks)
    cores = _cores()
    for chunk in chunks:
        yield chunk, *work(chunk)
        if cores > 1 and left() > ALONE:
            break
    else:
        return
    with started(min(cores, MOST_WORKERS), tokenizer, how) as workers:
        while not all(worker.pipe.poll() for worker in workers):  # each says so when it is ready
            _refuse_dead(workers)
            if (chunk := next(chunks, None)) is None:
                return
            yield chunk, *work(chunk)
        for worker in workers:
            _received(worker)
        yield from in_order(chunks, workers)


def in_order(chunks: Iterator[Chunk], workers: list[Worker]) -> Iterator[Result]:
    """Hands each idle worker the next chunk; gives what is made in the order of the chunks."""
    idle, busy = list(workers), dict[Connection, tuple[int, Chunk, Worker]]()
    done = dict[int, Result]()
    given = taken = 0
    while True:
        while idle and given - taken < AHEAD * len(workers) and (chunk := next(chunks, None)) is not None:
            worker = idle.pop()
            _send(worker, chunk)
            busy[worker.pipe] = given, chunk, worker
            given += 1
        if not busy and not done:
            return
        for pipe in wait(list(busy)) if busy else ():
            number, chunk, worker = busy.pop(pipe)
            done[number] = (chunk, *_received(worker))
            idle.append(worker)
        while taken in done:
            yield done.pop(taken)
            taken += 1


@contextmanager
def started(count: int, tokenizer: "PreTrainedTokenizerBase", how: How) -> Iterator[list[Worker]]:
    """That many workers; none is left, however this ends. They are started anew, for threads do not survive a fork."""
    context = multiprocessing.get_context("spawn")
    workers = []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, tokenizer, how), daemon=True)
            process.start()
            theirs.close()  # so that the pipe ends with the worker
            workers.append(Worker(process, ours))
        yield workers
    finally:
        for worker in workers:
            worker.pipe.close()
            worker.process.terminate()
        for worker in workers:
            worker.process.join()


def _work(pipe: Connection, tokenizer: "PreTrainedTokenizerBase", how: How) -> None:
    """A worker, until its pipe ends. Ctrl-C reaches it too; what to do then is for the first process to say."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a worker for each core already
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        work = Tokenizing(tokenizer, how)
        pipe.send(None)
        while True:
            chunk = pipe.recv()
            try:
                found = work(chunk)
            except Exception:  # a bug: it is told where it can be seen
                found = traceback.format_exc()
            pipe.send(found)


def _send(worker: Worker, chunk: Chunk) -> None:
    try:
        worker.pipe.send(chunk)
    except OSError as error:
        raise _died(worker) from error


def _received(worker: Worker):
    try:
        found = worker.pipe.recv()
    except (EOFError, OSError) as error:
        raise _died(worker) from error
    if isinstance(found, str):
        raise RuntimeError(f"in a worker that tokenizes:\n{found}")
    return found


def _refuse_dead(workers: list[Worker]) -> None:
    if dead := next((worker for worker in workers if not worker.process.is_alive()), None):
        raise _died(dead)


def _died(worker: Worker) -> OutOfMemoryError:
    worker.process.join()
    code = worker.process.exitcode or 0
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return OutOfMemoryError(
        Problem(
            f"a worker that tokenizes {how}",
            fix="look for out-of-memory kills; fewer cores (`taskset -c 0-3 lora …`) need less memory",
        )
    )


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
