"""A run folder: what lies in it, who may write to it, and how it comes into being."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lora_cli.errors import Problem, StorageError

try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second run out of the folder
    fcntl = None


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def record(self) -> Path:
        return self.path / "run.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def lock(self) -> Path:
        return self.path / "run.lock"

    def check_free(self, *, resume: bool, overwrite: bool) -> None:
        """Raise StorageError where a run would meet another one, old or under way, or where there is none to resume."""
        if self.path.exists() and not self.path.is_dir():
            raise StorageError(Problem("the output is a file", where=str(self.path), fix="give a folder with `--out`"))
        if self.lock.exists():
            with self.locked():
                pass
        if self._is_empty() or overwrite:
            return
        if not resume:
            raise StorageError(
                Problem(
                    "the output folder is not empty",
                    where=str(self.path),
                    fix="continue that run with `--resume`, write elsewhere with `--out`, or move it aside with `--overwrite`",
                )
            )
        if not self.recipe.is_file():
            raise StorageError(
                Problem(
                    "there is no run to resume: no recipe.yaml",
                    where=str(self.path),
                    fix="give the run's folder with `--out`",
                )
            )

    def prepare(self, *, overwrite: bool) -> Path | None:
        """Make the folder; with `overwrite`, an old run is moved aside first. Returns where it was moved to."""
        moved = self._move_aside() if overwrite and not self._is_empty() else None
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                Problem(
                    f"can't be written: {error.strerror}",
                    where=str(self.path),
                    fix="give a folder you may write to with `--out`",
                )
            ) from error
        return moved

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process alone; the lock goes with the process, however it ends."""
        with self.lock.open("a+") as file:
            if fcntl is None:
                yield
                return
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise StorageError(
                    Problem(
                        f"another run is writing here: {file.read().strip() or 'unknown'}",
                        where=str(self.path),
                        fix="wait for it, or give another folder with `--out`",
                    )
                ) from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield

    def _is_empty(self) -> bool:
        return not self.path.is_dir() or not any(entry for entry in self.path.iterdir() if entry != self.lock)

    def _move_aside(self) -> Path:
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        self.path.rename(aside)
        return aside


def write_json(file: Path, content: object) -> None:
    """Whole or not at all: written beside the file, then renamed over it."""
    draft = file.with_name(f".tmp-{file.name}")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    draft.replace(file)
