"""If it said "saved step N", then after any crash `--resume` goes on from N or later, to the bytes of a run without one."""

import random
import signal
import subprocess
import sys
import time

import pytest
from faults import assert_whole, at_call, forked, send
from running import adapter_bytes, events

from lora_cli.errors import StorageError
from lora_cli.runs.folder import RunFolder

SETTINGS = {
    "training.global_batch_size": 5,  # of 8 rows: epochs end in the middle of a step
    "training.micro_batch_size": 2,
    "training.max_steps": 8,
    "training.save_steps": 1,
    "training.eval_steps": 3,
    "training.keep_best": True,
    "lora.dropout": 0.1,
    "data.eval": "30%",
}
KILLS = 5  # a run, at moments drawn from all of it: loading, steps, saving, rotating, the end
CHAINS = 4


@pytest.mark.parametrize("seed", range(CHAINS))
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_never_was(seed, straight, recipe, tmp_path):
    file, out, draw = recipe(SETTINGS), tmp_path / "out", random.Random(seed)
    again, announced, kills = (), 0, 0
    while kills < KILLS:
        run = forked("train", file, *again, log=tmp_path / "log")
        steps = draw.choice([0, 1, 1, 2])  # of this session; none: while it starts
        run.wait_for(lambda run=run, steps=steps: run.said.count("\nsaved step ") >= steps)
        time.sleep(draw.random() * (0.06 if steps else 1.0))
        run.kill()
        killed = run.wait() != 0
        kills += killed
        announced = max(announced, run.announced) if killed else 0
        assert_whole(out / "checkpoints", announced=announced)
        again = () if not (out / "recipe.yaml").is_file() else ("--resume",) if killed else ("--overwrite",)

    assert forked("train", file, *again, log=tmp_path / "log").wait() == 0, (tmp_path / "log").read_text()

    assert adapter_bytes(out) == adapter_bytes(straight)
    curves = [[(e["step"], e["loss"]) for e in events(folder, "step")] for folder in (out, straight)]
    assert curves[0] == curves[1]
    assert [path.name for path in [*out.glob(".*"), *out.glob("checkpoints/.*")]] == []


def test_a_run_that_is_killed_while_it_writes_its_result_is_finished_by_the_next(straight, recipe, tmp_path):
    """At every file of the result: what `--resume` leaves is what an uninterrupted run leaves."""
    file, out = recipe(SETTINGS), tmp_path / "out"
    for number in range(1, 4):
        run = forked(
            "train", file, *(["--resume"] if number > 1 else []), log=tmp_path / "log", before=die_in_move(number)
        )
        assert run.wait() == -signal.SIGKILL
        assert_whole(out / "checkpoints", announced=8)

    assert forked("train", file, "--resume", log=tmp_path / "log").wait() == 0

    mine, theirs = ({path.name for path in folder.iterdir()} for folder in (out, straight))
    assert mine == theirs
    assert adapter_bytes(out) == adapter_bytes(straight)


def die_in_move(number: int):
    """Puts in the fault: killed when the file of that number has been forced to disk, or is about to take its place."""

    def put_in() -> None:
        from lora_cli.runs import train

        move = train.move_into

        def move_and_die(draft, folder, *, last):
            type(draft).replace = at_call(number, type(draft).replace, send(signal.SIGKILL))
            move(draft, folder, last=last)

        train.move_into = move_and_die

    return put_in


@pytest.mark.parametrize("seed", range(5))
def test_of_two_writers_exactly_one_wins(seed, recipe, tmp_path):
    file = recipe(SETTINGS)
    runs = [forked("train", file, "--out", tmp_path / "one", log=tmp_path / f"log-{i}") for i in range(2)]

    codes = sorted(run.wait() for run in runs)

    assert codes == [0, 5], [run.said for run in runs]
    assert len(events(tmp_path / "one", "started")) == 1
    assert_whole(tmp_path / "one/checkpoints", announced=8)


def test_a_lock_is_not_inherited_by_programs_that_are_started_meanwhile(tmp_path):
    folder = RunFolder(tmp_path / "out")
    with folder.held(resume=False, overwrite=False):
        (folder.path / "recipe.yaml").write_text("")
        program = [sys.executable, "-c", "print('up', flush=True); input()"]
        child = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False)
        child.stdout.readline()

    with folder.held(resume=True, overwrite=False):
        pass

    child.communicate(b"\n")


def test_a_folder_that_another_process_took_over_is_not_written_to(tmp_path):
    folder = RunFolder(tmp_path / "out")
    with folder.held(resume=False, overwrite=False):
        folder.check_ours()
        folder.lock.write_text('{"process": 1, "host": "elsewhere", "started": "today", "command": "lora train x"}')

        with pytest.raises(StorageError, match="another run is writing here: process 1 on elsewhere, since today"):
            folder.check_ours()
