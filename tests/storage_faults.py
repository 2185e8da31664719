"""What can happen to a disk: every call of one save failing or killed, and every file of a checkpoint damaged.

Each trial starts from a copy of the same checkpoints, and raises AssertionError where a promise is broken. The laws try
some of them, `make torture` all.
"""

import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from faults import assert_whole, in_fork
from running import hashes
from saving import Run
from tracing import KILL, LOST, READS, Call, Traced, stand_still

from lora_cli.durable import sweep
from lora_cli.errors import StorageError
from lora_cli.lora.peft_format import CONFIG, WEIGHTS
from lora_cli.train.checkpoint import MANIFEST, OPTIMIZER, STATE, newest_checkpoint, restore, set_damaged_aside

FAULTS = {"KILL": KILL, "EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "lost": LOST}
WRITES = ("write", "pwrite", "writev")
FILES = (CONFIG, WEIGHTS, OPTIMIZER, STATE, MANIFEST)
KEEP = 2


class Save:
    """Steps 2 and 3 are saved, and step 4 is about to be; then step 2 goes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.before = folder, folder / "before"
        self.run = Run()
        for _ in range(3):
            self.run.train(1)
            self.run.save(self.before, keep=KEEP)
        self.run.train(1)
        traced, _, place = self._attempt()
        self.calls: list[Call] = traced.calls
        self.writes = [number for number, call in enumerate(self.calls, 1) if call.name in WRITES]
        self.expected = hashes(place)

    def trial(self, at: int, fault: int | str) -> None:
        """The call of that number fails, or kills; the next start saves the step as if nothing had been."""
        _, code, place = self._attempt(at, fault)
        said = (self.folder / "log").read_text()
        if fault == KILL:
            assert code == -9
        else:
            assert code in (0, StorageError.code), said
        announced = 4 if "saved step 4" in said else 0
        assert bool(announced) == (code == 0)
        assert_whole(place, announced=max(announced, 3))
        assert {name for name in names(place) if not name.startswith((".tmp-", ".del-"))} <= set(map(step, (2, 3, 4)))
        sweep(place)
        self.run.save(place, keep=KEEP)
        assert hashes(place) == self.expected

    def _attempt(self, at: int = 0, fault: int | str = KILL) -> tuple[Traced, int, Path]:
        place = self.folder / "checkpoints"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.before, place)
        traced = Traced(in_fork(lambda: self._save(place), log=self.folder / "log").pid, place)
        return traced, traced.run(at, fault), place

    def _save(self, place: Path) -> None:
        stand_still()
        try:
            self.run.save(place, keep=KEEP)
        except StorageError as error:
            print(error)
            sys.exit(error.code)
        except OSError as error:  # which `lora` reports with its file as a StorageError
            print(error)
            sys.exit(StorageError.code if error.filename else 1)
        print("saved step 4")


def step(number: int) -> str:
    return f"step-{number:07d}"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 2)  # JSON lacks nothing without its last byte, an end of line


def halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def lengthen(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"\0")


def flip(file: Path, bit: int | None = None) -> None:
    """One bit, by default in the middle."""
    content = bytearray(file.read_bytes())
    bit = len(content) * 4 if bit is None else bit
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def zero(file: Path) -> None:
    """As some file systems leave a file after a power cut: its length, and nothing in it."""
    file.write_bytes(bytes(file.stat().st_size))


def swap(file: Path) -> None:
    other = file.with_name(FILES[(FILES.index(file.name) + 1) % len(FILES)])
    content = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(content)


def turn_into_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


HARMS: dict[str, Callable[[Path], None]] = {
    "cut": cut,
    "halved": halve,
    "empty": empty,
    "longer": lengthen,
    "a bit flipped": flip,
    "zeros": zero,
    "swapped with the next": swap,
    "gone": Path.unlink,
    "a folder": turn_into_folder,
}
DAMAGE = {
    f"{name} {harm}": (lambda folder, name=name, harm=harm: HARMS[harm](folder / name))
    for harm in HARMS
    for name in FILES
}


class Damage:
    """Steps 1, 2 and 3 are saved; something happens to the newest."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.before = folder, folder / "before"
        run = Run()
        for _ in range(3):
            run.train(1)
            run.save(self.before)
        self.expected = hashes(self.before / step(3))

    def trial(self, harm: Callable[[Path], None]) -> None:
        """It is set aside with its bytes, and from the one before the same checkpoint is made again."""
        place = self.folder / "checkpoints"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.before, place)
        harm(place / step(3))
        damaged = hashes(place / step(3))

        set_damaged_aside(place)

        assert names(place) == [step(1), step(2), f"{step(3)}.damaged-1"]
        assert hashes(place / f"{step(3)}.damaged-1") == damaged
        run, found = Run(), newest_checkpoint(place)
        restore(found, run.model, run.optimizer, run.parameters)
        run.step = found.progress.step
        run.train(1)
        run.save(place)
        assert hashes(place / step(3)) == self.expected


def unreadable(folder: Path, fault: int, *, log: Path) -> tuple[list[str], str]:
    """What is called the newest by a process whose first read of each file fails in turn, as over a bad sector."""

    def look() -> None:
        stand_still()
        set_damaged_aside(folder)
        print("newest", newest_checkpoint(folder).folder.name)

    traced = Traced(in_fork(look, log=log).pid, folder, READS)
    traced.run(1, fault)
    return names(folder), log.read_text()
