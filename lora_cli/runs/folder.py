"""A run folder: what lies in it, who may write to it, and how it comes into being."""

import json
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lora_cli.durable import DOOMED, DRAFT, replace_file, sweep, sync_path
from lora_cli.errors import Problem, SafetyError, StorageError
from lora_cli.runs import lock


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
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def card(self) -> Path:
        return self.path / "README.md"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def lock(self) -> Path:
        return self.path / "run.lock"

    def read_record(self) -> dict:
        """What run.json says; empty where there is none, or none that can be read."""
        try:
            found = json.loads(self.record.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def check_free(self, *, resume: bool, overwrite: bool) -> None:
        """Raise StorageError where a run would meet another one, old or under way, or where there is none to resume."""
        if self.path.exists() and not self.path.is_dir():
            raise StorageError(Problem("the output is a file", where=str(self.path), fix="give a folder with `--out`"))
        self._refuse_links()
        lock.check_free(self.lock)
        self._check_content(resume=resume, overwrite=overwrite)

    @contextmanager
    def held(self, *, resume: bool, overwrite: bool) -> Iterator["Hold"]:
        """Keep every other run out, from before anything is read to after the last write.

        Nothing but the lock is made before the run begins, and where it can't begin nothing stays.
        """
        self._refuse_links()
        made = self._made()
        with ExitStack() as locks:
            locks.enter_context(lock.locked(self.lock))
            try:
                self._check_content(resume=resume, overwrite=overwrite)
                yield Hold(self, locks, overwrite=overwrite)
            finally:
                if self._is_empty():
                    self._vanish(made)

    def check_ours(self) -> None:
        """Raise StorageError where another process has taken the folder."""
        lock.check_ours(self.lock)

    def _check_content(self, *, resume: bool, overwrite: bool) -> None:
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

    def _made(self) -> bool:
        """Whether the folder had to be made."""
        if self.path.is_dir():
            return False
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                Problem(
                    f"can't be written: {error.strerror}",
                    where=str(self.path),
                    fix="give a folder you may write to with `--out`",
                )
            ) from error
        return True

    def _vanish(self, made: bool) -> None:
        sweep(self.path)
        with suppress(OSError):  # it is not there, or someone has put something in
            self.checkpoints.rmdir()
        self.lock.unlink(missing_ok=True)
        with suppress(OSError):
            if made:
                self.path.rmdir()

    def _refuse_links(self) -> None:
        """Raise SafetyError where writing would follow a symbolic link to somewhere else, which a folder that came from
        elsewhere may hold."""
        if self.path.is_symlink() and self.path.resolve().parent != self.path.parent.resolve():
            raise SafetyError(
                Problem(
                    f"the output is a symbolic link, to {self.path.resolve()}",
                    where=str(self.path),
                    fix="give that folder itself with `--out`",
                )
            )
        written = (path for pattern in ("*", "checkpoints/*", "checkpoints/*/*") for path in self.path.glob(pattern))
        if link := next((path for path in written if path.is_symlink()), None):
            what = "the run folder holds a symbolic link, and a run writes through none"
            raise SafetyError(Problem(what, where=str(link), fix="remove it, or give another folder with `--out`"))

    def _is_empty(self) -> bool:
        """Whether no run has begun here: one that was killed before its first file may have left a lock and drafts."""
        return not self.path.is_dir() or not (_entries(self.path) - {self.lock.name, self.checkpoints.name}) | (
            _entries(self.checkpoints) if self.checkpoints.is_dir() else set()
        )


@dataclass(frozen=True)
class Hold:
    """A run folder that this process holds."""

    folder: RunFolder
    locks: ExitStack
    overwrite: bool = False

    def begin(self) -> Path | None:
        """Make the folder ready for its run: an old run that is to be overwritten moves aside, to the path returned."""
        folder = self.folder
        aside = self._move_aside() if self.overwrite and not folder._is_empty() else None
        folder.checkpoints.mkdir(exist_ok=True)
        for place in (folder.path, folder.checkpoints):
            sweep(place)
        return aside

    def _move_aside(self) -> Path:
        """The new folder is locked before it takes the old one's place, so that there is never one to be had."""
        path, number = self.folder.path, 1
        while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
            number += 1
        fresh = path.with_name(f"{DRAFT}{path.name}-{secrets.token_hex(4)}")
        fresh.mkdir()
        self.locks.enter_context(lock.locked(RunFolder(fresh).lock))
        path.rename(aside)
        fresh.rename(path)
        sync_path(path.parent)
        return aside


def _entries(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir() if not entry.name.startswith((DRAFT, DOOMED))}


def write_json(file: Path, content: object) -> None:
    write_text(file, json.dumps(content, indent=2) + "\n")


def write_text(file: Path, content: str) -> None:
    """Whole or not at all."""
    replace_file(file, content.encode())
