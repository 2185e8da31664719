"""Chunks that several processes tokenize are those that one tokenizes, in the same order."""

import json
import multiprocessing
import os
import signal

import pytest
from templates import CHATML, tiny_tokenizer

from lora_cli.data.examples import Examples, Origin, Store
from lora_cli.data.tokenizing import Chunk, How, Reading, Tokenizing
from lora_cli.data.types import RowId
from lora_cli.data.workers import in_order, started, tokenized
from lora_cli.errors import OutOfMemoryError

HOW = How(max_length=64, bad_rows="skip")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(CHATML)


def chunks(count=30):
    """Chunks of different sizes, some with rows that cannot be used."""
    for number in range(count):
        lines = [json.dumps({"prompt": "what", "completion": " the cat" * (i % 7)}) for i in range(1 + number * 5 % 17)]
        rows = [(RowId("a.jsonl", 100 * number + i), line) for i, line in enumerate([*lines, "oops"][number % 2 :])]
        yield Chunk(Reading(0, "completion", {}), rows, number / count)


def as_values(results):
    """What can be compared of results: the chunk's share, the counts, the examples."""
    return [
        (chunk.share, made, list(Examples([Store(arrays, (Origin("a.jsonl", True, 1.0),))])))
        for chunk, made, arrays in results
    ]


def ready(workers):
    assert [worker.pipe.recv() for worker in workers] == [None] * len(workers)
    return workers


def test_two_workers_give_what_one_process_gives_in_its_order_and_are_gone_afterwards(tokenizer):
    work = Tokenizing(tokenizer, HOW)
    expected = as_values((chunk, *work(chunk)) for chunk in chunks())

    with started(2, tokenizer, HOW) as workers:
        found = as_values(in_order(chunks(), ready(workers)))

    assert found == expected
    assert sum(made.tokens for _, made, _ in found) > 0
    assert not multiprocessing.active_children()


def test_a_worker_that_is_killed_is_one_clear_error(tokenizer):
    def kill_one(workers):
        for number, chunk in enumerate(chunks()):
            if number == 5:
                os.kill(workers[0].process.pid, signal.SIGKILL)
                workers[0].process.join()
            yield chunk

    with (
        pytest.raises(OutOfMemoryError, match="a worker that tokenizes was killed by signal 9"),
        started(2, tokenizer, HOW) as workers,
    ):
        list(in_order(kill_one(ready(workers)), workers))

    assert not multiprocessing.active_children()


def test_an_interruption_leaves_no_worker(tokenizer):
    results = tokenized(chunks(), tokenizer, HOW, left=lambda: 1e9)
    next(results)
    next(results)
    assert multiprocessing.active_children()

    with pytest.raises(KeyboardInterrupt):
        results.throw(KeyboardInterrupt)

    assert not multiprocessing.active_children()


def test_a_few_rows_are_tokenized_without_workers(tokenizer, monkeypatch):
    monkeypatch.setattr("lora_cli.data.workers.started", lambda *_: pytest.fail("workers were started"))

    found = as_values(tokenized(chunks(), tokenizer, HOW, left=lambda: 1000))

    assert [share for share, _, _ in found] == [number / 30 for number in range(30)]


def test_this_process_goes_on_until_the_workers_are_ready_and_nothing_is_lost(tokenizer):
    expected = as_values(tokenized(chunks(), tokenizer, HOW, left=lambda: 0))

    found = as_values(tokenized(chunks(), tokenizer, HOW, left=lambda: 1e9))

    assert found == expected
