"""Workers that hang, disagree or fail: the run ends soon, as one, and says which it was. Forked workers, the whole command."""

import errno
import os
import signal
import time

import pytest
from running import events, lora_workers

from lora_cli.train.watch import DEFAULT_SECONDS, PATIENCE, patience, problem

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
LONG = {"training.max_steps": 100_000, "training.save_steps": None}


def in_forward(number: int, act) -> None:
    """Let this worker do something else at the start of a forward."""
    from lora_cli.train.task import Task

    forward, calls = Task.forward, []

    def interrupted(task, batch):
        calls.append(1)
        if len(calls) == number:
            act()
        return forward(task, batch)

    Task.forward = interrupted


def of_rank(wanted: int, act):
    return lambda rank: act() if rank == wanted else None


@pytest.mark.parametrize("environment", [{}, FSDP2], ids=["ddp", "fsdp2"])
def test_a_worker_that_hangs_is_named_with_what_each_did_last(environment, recipe):
    ended = lora_workers(
        2,
        "train",
        recipe(LONG),
        before=of_rank(1, lambda: in_forward(4, lambda: time.sleep(600))),
        code=None,
        **environment | {PATIENCE: "4"},
    )

    # whoever sees it first says so; the other sees it too, or that the first has left, or is ended
    assert {done.code for done in ended} <= {8, -signal.SIGKILL}, ended[0].err
    said = next(done.err for done in ended if "hangs" in done.err)
    what, where, fix = said[said.index("error:") :].splitlines()
    assert what.startswith("error: worker 1 hangs: nothing has happened for ")
    assert where.startswith("  --> done last: worker 1: the start of forward 1 after step 3; worker 0: ")
    assert "LORA_HANG_SECONDS sets how long to wait" in fix


def test_a_worker_that_is_stopped_is_ended(recipe):
    stop = of_rank(1, lambda: in_forward(4, lambda: os.kill(os.getpid(), signal.SIGSTOP)))

    ended = lora_workers(2, "train", recipe(LONG), before=stop, code=None, **{PATIENCE: "4"})

    assert [done.code for done in ended] == [8, -signal.SIGKILL], ended[0].err
    assert "error: worker 1 hangs: " in ended[0].err


def test_slow_is_not_hanging(recipe, tmp_path):
    slow = of_rank(1, lambda: in_forward(2, lambda: time.sleep(3)))

    lora_workers(2, "train", recipe({"training.max_steps": 2}), before=slow, **{PATIENCE: "20"})

    assert len(events(tmp_path / "out", "step")) == 2


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


@pytest.mark.parametrize("environment", [{}, FSDP2], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("writer", ["save_checkpoint", "save_adapter"])
def test_where_the_first_process_fails_to_save_all_leave_with_its_code(writer, environment, recipe, monkeypatch):
    monkeypatch.setattr(f"lora_cli.runs.train.{writer}", full_disk)

    ended = lora_workers(3, "train", recipe(), code=5, **environment)

    assert "error: the disk refuses: No space left on device\n  --> somewhere" in ended[0].err
    for done in ended[1:]:
        assert "error: worker 0 failed to write\n" in done.err


def test_workers_that_disagree_all_say_on_what(recipe):
    import sys

    other = of_rank(1, lambda: sys.argv.extend(["--set", "training.seed=7"]))

    for done in lora_workers(2, "train", recipe(), before=other, code=8):
        assert "error: the processes do not agree on training.seed\n" in done.err


def test_the_patience_is_a_number_of_seconds(monkeypatch):
    assert patience() == DEFAULT_SECONDS

    monkeypatch.setenv(PATIENCE, "7.5")
    assert patience() == 7.5

    monkeypatch.setenv(PATIENCE, "soon")
    assert patience() == DEFAULT_SECONDS


def test_many_workers_are_named_in_a_line_or_two():
    did = dict.fromkeys(range(64), "forward 2 after step 7")

    one, all_of_them = problem([63], did, 120.4), problem(list(did), did, 600)

    assert one.what == "worker 63 hangs: nothing has happened for 120 s"
    assert one.where.startswith("done last: worker 63: forward 2 after step 7; worker 0: ")
    assert one.where.endswith("; and 60 more")
    assert all_of_them.what == "all workers wait for each other: nothing has happened for 600 s"
