"""Several processes where one has a fault: all of them do the same about it."""

import os
import subprocess
import sys

import pytest
from running import ROOT, events

SETTINGS = {
    "training.global_batch_size": 8,
    "training.micro_batch_size": 4,
    "data.packing": False,
    "training.save_steps": 2,
}

# What a worker runs instead of `lora`: the command, with a fault on one rank
WORKER = """
import os, sys
sys.path.insert(0, {tests!r})
rank = int(os.environ["RANK"])
{fault}
from lora_cli.cli.main import main
sys.argv[0] = "lora"
main()
"""

SHORT_OF_MEMORY = """
from faults import with_room_for
from lora_cli.objectives.table import OBJECTIVES
if rank == 1:
    OBJECTIVES["sft"] = with_room_for(2, OBJECTIVES["sft"])
"""

FULL_DISK = """
import errno
from lora_cli.train import checkpoint
def full(file, content):
    raise OSError(errno.ENOSPC, "No space left on device", str(file))
if rank == 0:
    checkpoint.write_synced = full
"""


@pytest.fixture
def workers(tmp_path):
    """workers(fault, *arguments) -> two workers of torchrun, done."""

    def run(fault: str, *arguments: object) -> subprocess.CompletedProcess:
        script = tmp_path / "worker.py"
        script.write_text(WORKER.format(tests=str(ROOT / "tests"), fault=fault))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        return subprocess.run(
            [*torchrun, str(script), *map(str, arguments)],
            env=inherited | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=240,
        )

    return run


def test_where_one_rank_is_short_of_memory_all_take_the_step_again_in_halves(workers, lora, recipe, tmp_path):
    lora("train", recipe(SETTINGS), "--out", tmp_path / "one")

    done = workers(SHORT_OF_MEMORY, "train", recipe(SETTINGS), "--out", tmp_path / "two")

    assert done.returncode == 0, done.stderr
    [shortage] = events(tmp_path / "two", "out_of_memory")
    assert (shortage["step"], shortage["rank"], shortage["micro_batch_size"]) == (1, 1, 2)
    pairs = list(zip(events(tmp_path / "two", "step"), events(tmp_path / "one", "step"), strict=True))
    assert [mine["step"] for mine, _ in pairs] == [1, 2, 3, 4]
    assert all(mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6) for mine, theirs in pairs)


def test_where_the_first_rank_cannot_save_no_rank_waits(workers, recipe, tmp_path):
    done = workers(FULL_DISK, "train", recipe(SETTINGS))

    assert done.returncode != 0
    assert "the disk refuses: No space left on device" in done.stderr
    assert "worker 0 failed to write" in done.stderr
    assert "Saved" not in [event["event"] for event in events(tmp_path / "out")]
    assert not list((tmp_path / "out/checkpoints").iterdir())
