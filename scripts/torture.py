"""Faults by the hundred, and what is left after each: kills, failing disks, damaged files, jumping clocks, two writers.

    python scripts/torture.py --kills 200                       the sweep; a table at its end, exit 1 on any failure
    python scripts/torture.py --only "two writers" --seed 7     one kind of fault again, with the draws of that run
    python scripts/torture.py --page docs/torture.md            the table as a page

After every fault: each visible checkpoint verifies, none is older than the last one announced, errors end with exit 5 in
one block, `--resume` ends with the bytes of a run without a fault, and no draft stays behind.
"""

import argparse
import logging
import os
import platform
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from random import Random

sys.path.extend(str(Path(__file__).resolve().parent.parent / folder) for folder in (".", "tests"))
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import psutil
import torch
from faults import Forked, assert_whole, forked
from running import adapter_bytes, events, write_recipe
from storage_faults import DAMAGE, FAULTS, WRITES, Damage, Save, flip
from tiny import tiny_base
from tracing import AVAILABLE, LOST, Traced, stand_still

SETTINGS = {
    "training.global_batch_size": 5,  # of 12 rows: epochs end in the middle of a step
    "training.micro_batch_size": 2,
    "training.max_steps": 6,
    "training.save_steps": 1,
    "training.keep_checkpoints": 2,
    "lora.dropout": 0.1,
}
STEPS = 6
TOLD_EVERY = 50  # trials
EPOCHS = (0, 4_000_000_000)  # clocks stand anywhere from 1970 to 2096

Trial = Callable[[], None]


@dataclass
class Tally:
    fault: str
    trials: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Bench:
    """A folder for trials, with a base in it, and what a run without a fault leaves."""

    folder: Path
    kills: int
    seed: int

    @cached_property
    def base(self) -> Path:
        return tiny_base(self.folder / "base")

    @cached_property
    def file(self) -> Path:
        return write_recipe(self.folder, self.base, SETTINGS)

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @cached_property
    def straight(self) -> Path:
        folder = self.folder / "straight"
        run = forked("train", self.file, "--out", folder, log=self.log)
        assert run.wait() == 0, run.said
        return folder

    @cached_property
    def two_processes(self) -> Path:
        folder = self.folder / "straight-2"
        run = forked("train", self.file, "--out", folder, "--processes", 2, log=self.log)
        assert run.wait() == 0, run.said
        return folder

    @cached_property
    def seconds(self) -> float:
        """What a run takes."""
        began = time.monotonic()
        assert forked("train", self.file, "--out", self.folder / "timed", log=self.log).wait() == 0
        return time.monotonic() - began

    @cached_property
    def calls(self) -> list:
        """The changes that a whole run makes to its folder."""
        self.clear()
        traced = Traced(self.start(before=stand_still).pid, self.out)
        assert traced.run() == 0, self.log.read_text()
        return traced.calls

    def draw(self, fault: str, number: int) -> Random:
        return Random(f"{self.seed}/{fault}/{number}")

    def clear(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)

    def start(self, *arguments: object, before: Callable[[], None] = lambda: None) -> Forked:
        return forked("train", self.file, *arguments, log=self.log, before=before)

    def check(self, run: Forked, code: int, *, before: Callable[[], None] = lambda: None) -> None:
        """The promises, after a run that has ended with `code`."""
        said = run.said
        assert code in (0, 5, -9), f"exit {code}\n{said}"
        assert "Traceback" not in said, said
        if code == 5:
            assert said.count("error: ") == 1, said
            assert len(said[said.index("error: ") :].splitlines()) <= 12, said
        assert_whole(self.out / "checkpoints", announced=run.announced)
        self.check_resumed(before=before)

    def check_resumed(self, *arguments: object, before: Callable[[], None] = lambda: None, like: Path | None = None):
        begun = (self.out / "recipe.yaml").is_file()
        run = self.start(*(["--resume"] if begun else []), *arguments, before=before)
        assert run.wait() == 0, run.said
        assert adapter_bytes(self.out) == adapter_bytes(like or self.straight), "other bytes"
        left = [path.name for path in [*self.out.glob(".*"), *self.out.glob("checkpoints/.*")]]
        assert left == [], left


def killed_at_random(bench: Bench) -> Iterator[Trial]:
    """kill -9 at a random moment of a run"""

    def trial(draw: Random) -> None:
        bench.clear()
        run = bench.start()
        time.sleep(draw.random() * bench.seconds)
        run.kill()
        bench.check(run, run.wait())

    return (lambda i=i: trial(bench.draw("moment", i)) for i in range(bench.kills))


def any_call(bench: Bench) -> Iterator[Trial]:
    """a random system call of a whole run: kill -9, EIO or ENOSPC"""

    def trial(draw: Random) -> None:
        kind = draw.choice(["KILL", "EIO", "ENOSPC"])
        number = draw.randrange(len(bench.calls)) + 1
        bench.clear()
        run = bench.start(before=stand_still)
        traced = Traced(run.pid, bench.out)
        code = traced.run(number, FAULTS[kind])
        try:
            bench.check(run, code)
        except AssertionError as error:
            raise AssertionError(f"{kind} at call {number}, {traced.calls[-1]}: {error}") from error

    return (lambda i=i: trial(bench.draw("call", i)) for i in range(bench.kills if AVAILABLE else 0))


def every_call_of_a_save(bench: Bench) -> Iterator[Trial]:
    """every system call of one save: kill -9, EIO, ENOSPC; every write of it lost"""
    if AVAILABLE:
        save = Save(bench.folder / "save")
        for number, call in enumerate(save.calls, 1):
            for fault in FAULTS.values():
                if fault != LOST or call.name in WRITES:
                    yield lambda number=number, fault=fault: save.trial(number, fault)


def full_disk(bench: Bench) -> Iterator[Trial]:
    """a tmpfs that fills up, at every size; then it gets room (as root)"""
    size = sum(file.stat().st_size for file in bench.straight.rglob("*") if file.is_file())

    def trial(share: float) -> None:
        bench.clear()
        bench.out.mkdir()
        _mount(bench.out, f"size={int(size * share)}")
        try:
            run = bench.start()
            code = run.wait()
            assert code == 5, f"exit {code}\n{run.said}"
            _mount(bench.out, "remount,size=64m")
            bench.check(run, code)
        finally:
            subprocess.run(["umount", bench.out], check=True)

    shares = (0.1 + 0.8 * i / bench.kills * 5 for i in range(bench.kills // 5))
    return (lambda share=share: trial(share) for share in shares if os.geteuid() == 0)


def large_file(bench: Bench) -> Iterator[Trial]:
    """files that may not grow beyond a limit (ulimit -f)"""
    largest = max(file.stat().st_size for file in bench.straight.rglob("*") if file.is_file())

    def trial(draw: Random) -> None:
        limit = draw.randrange(4_000, largest)
        bench.clear()
        run = bench.start(before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        bench.check(run, run.wait())

    return (lambda i=i: trial(bench.draw("limit", i)) for i in range(bench.kills // 5))


def damaged_files(bench: Bench) -> Iterator[Trial]:
    """the newest checkpoint damaged, every file in nine ways, then `--resume`"""

    def trial(harm: Callable[[Path], None]) -> None:
        _take_back(bench)
        harm(bench.out / f"checkpoints/step-{STEPS:07d}")
        bench.check_resumed()

    return (lambda harm=harm: trial(harm) for harm in DAMAGE.values())


def flipped_bits(bench: Bench) -> Iterator[Trial]:
    """a random bit of a checkpoint flipped"""
    damage = Damage(bench.folder / "damage")

    def trial(draw: Random) -> None:
        def harm(folder: Path) -> None:
            file = draw.choice(sorted(folder.iterdir()))
            bit = draw.randrange(file.stat().st_size * 8)
            flip(file, bit)

        damage.trial(harm)

    return (lambda i=i: trial(bench.draw("bit", i)) for i in range(bench.kills * 5))


def jumping_clocks(bench: Bench) -> Iterator[Trial]:
    """kill -9, then every file's time anywhere from 1970 to 2096, and a clock that jumps while it resumes"""

    def trial(draw: Random) -> None:
        bench.clear()
        run = bench.start()
        run.wait_for(lambda: run.announced > draw.randrange(3))
        run.kill()
        code = run.wait()
        for path in bench.out.rglob("*"):
            os.utime(path, (draw.randint(*EPOCHS),) * 2)

        def jump() -> None:
            time.time = lambda: float(draw.randint(*EPOCHS))

        bench.check(run, code, before=jump)

    return (lambda i=i: trial(bench.draw("clock", i)) for i in range(bench.kills // 10))


def two_writers(bench: Bench) -> Iterator[Trial]:
    """two writers of one folder"""

    def trial() -> None:
        bench.clear()
        runs = [forked("train", bench.file, log=bench.folder / f"log-{i}") for i in range(2)]
        codes = sorted(run.wait() for run in runs)
        assert codes == [0, 5], [run.said for run in runs]
        assert len(events(bench.out, "started")) == 1
        assert_whole(bench.out / "checkpoints", announced=STEPS)
        assert adapter_bytes(bench.out) == adapter_bytes(bench.straight), "other bytes"

    return (trial for _ in range(bench.kills // 4))


def killed_workers(bench: Bench) -> Iterator[Trial]:
    """one of two processes of a run killed"""

    def trial(draw: Random) -> None:
        bench.clear()
        run = bench.start("--processes", 2)
        step = draw.randrange(1, STEPS)
        run.wait_for(lambda: run.announced >= step)
        workers = psutil.Process(run.pid).children(recursive=True)
        if workers:
            draw.choice(workers[-2:]).kill()
        code = run.wait()
        assert code in (0, 8), f"exit {code}\n{run.said}"
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert alive == [], "orphans"
        assert_whole(bench.out / "checkpoints", announced=run.announced)
        bench.check_resumed("--processes", 2, like=bench.two_processes)

    return (lambda i=i: trial(bench.draw("worker", i)) for i in range(bench.kills // 40))


SWEEP = (
    every_call_of_a_save,
    flipped_bits,
    killed_at_random,
    any_call,
    large_file,
    full_disk,
    two_writers,
    jumping_clocks,
    killed_workers,
    damaged_files,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="how many random kills; the other counts follow it")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of every draw")
    parser.add_argument("--only", nargs="+", default=[""], help="the faults whose name holds one of these texts")
    parser.add_argument("--page", type=Path, help="write the table here too, after each kind of fault")
    asked = parser.parse_args()
    print(f"seed {asked.seed}", file=sys.stderr)
    torch.set_num_threads(1)
    logging.getLogger("lora_cli").addHandler(logging.NullHandler())  # what a command says goes to its log
    tallies: list[Tally] = []
    with tempfile.TemporaryDirectory(prefix="lora-torture-") as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        bench = Bench(Path(folder).resolve(), asked.kills, asked.seed)
        for sweep in SWEEP:
            if any(text in sweep.__doc__ for text in asked.only):
                print(f"      {sweep.__doc__} …", file=sys.stderr, flush=True)
                tallies.append(tried(sweep.__doc__, sweep(bench)))
                if asked.page:
                    asked.page.write_text(page(tallies, asked.seed), encoding="utf-8")
    print(table(tallies))
    return 1 if any(tally.failures for tally in tallies) else 0


def tried(fault: str, trials: Iterator[Trial]) -> Tally:
    tally, began = Tally(fault), time.monotonic()
    for trial in trials:
        tally.trials += 1
        try:
            trial()
        except AssertionError as error:
            tally.failures.append(str(error))
            print(f"FAILED {fault}, trial {tally.trials}: {error}", file=sys.stderr, flush=True)
        if tally.trials % TOLD_EVERY == 0:
            print(f"{tally.trials:5} done", file=sys.stderr, flush=True)
    tally.seconds = time.monotonic() - began
    print(f"{tally.trials:5} {fault}: {len(tally.failures)} failed, {tally.seconds:.0f} s", file=sys.stderr, flush=True)
    return tally


def table(tallies: list[Tally]) -> str:
    rows = [f"| {tally.fault} | {tally.trials:,} | {len(tally.failures)} |" for tally in tallies]
    total = f"| **all** | **{sum(t.trials for t in tallies):,}** | **{sum(len(t.failures) for t in tallies)}** |"
    return "\n".join(["| fault | trials | failures |", "| --- | ---: | ---: |", *rows, total])


def page(tallies: list[Tally], seed: int) -> str:
    introduction = re.sub(r"(?m)^    .*\n+", "", __doc__).strip()
    return (
        f"# Faults tried\n\n{introduction}\n\n{table(tallies)}\n\n"
        f"{datetime.now(UTC):%d %B %Y}, seed {seed}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{platform.system()} on {platform.machine()}; a tiny Llama of {STEPS} steps that are all saved. "
        "`make torture KILLS=200` runs it again and writes this page; a part of it is in every run of the tests.\n"
    )


def _mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)


def _take_back(bench: Bench) -> None:
    """The folder as it was when the last checkpoint had been saved and nothing else yet."""
    bench.clear()
    shutil.copytree(bench.straight, bench.out)
    for name in adapter_bytes(bench.out):
        (bench.out / name).unlink()


if __name__ == "__main__":
    sys.exit(main())
