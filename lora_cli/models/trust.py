"""Code that a base brings along. It runs where the user named its repository with a full commit, and nowhere else.

    --trust-remote-code REPO@COMMIT        COMMIT: 40 hex digits; of a folder, the digest of the code in it

What is trusted is the code, not the place: a folder may run code if it is, byte for byte, the code that was named. So a
model that was merged runs as its base did, and a file that has changed since it was read does not. This is the one
setting of a command that is not handed on as an argument: what loads a model asks here, and nobody on the way can widen it.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from lora_cli.errors import Problem, RecipeError, SafetyError
from lora_cli.limits import read_json

FLAG = "--trust-remote-code"
COMMIT = re.compile(r"[0-9a-f]{40}")
CODE = "**/*.py"
AUTO_MAP = "auto_map"
# Of the base's own files, and named as a class in them: no other repository's, no path
OWN_CLASS = re.compile(r"[A-Za-z_]\w*\.[A-Za-z_]\w*")
LARGEST_CODE = 10_000_000  # bytes


@dataclass(frozen=True)
class Named:
    repo: str
    commit: str


@dataclass
class Trust:
    named: tuple[Named, ...] = ()
    digests: set[str] = field(default_factory=set)  # of code that was found to be what was named


_TRUST: ContextVar[Trust] = ContextVar("trust", default=Trust())  # noqa: B039  the default is never added to


def trust(flags: Iterable[str]) -> None:
    """Trust these from here on, and nothing that was trusted before. Raises RecipeError for a flag without a full commit."""
    _TRUST.set(Trust(tuple(map(_named, flags))))


def named_commit(repo: str) -> str | None:
    """The commit that the user named with this repository."""
    return next((named.commit for named in _TRUST.get().named if named.repo == repo), None)


def approve(repo: str, folder: Path, revision: str | None) -> bool:
    """Whether the code in a base's folder is what the user named; it may run from here on, there and in a copy.

    `revision` is the commit of a hub id, None for a folder. Raises SafetyError for code that comes from somewhere else.
    """
    trusted, digest = _TRUST.get(), code_digest(folder)
    named = [found for found in trusted.named if _same(found.repo, repo, folder)]
    if all(found.commit != (revision or digest) for found in named):
        return False
    _refuse_code_elsewhere(folder)
    trusted.digests.add(digest)
    return True


def may_run(folder: Path) -> bool:
    """Whether the code in this folder is, byte for byte, code that was named."""
    digests = _TRUST.get().digests
    return bool(digests) and code_digest(folder) in digests


def code_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(CODE) if path.is_file())


def code_digest(folder: Path) -> str:
    """40 hex digits of the SHA-256 over every code file and what config.json says of them."""
    files = code_files(folder)
    if sum(path.stat().st_size for path in files) > LARGEST_CODE:
        what = f"its code has more than {LARGEST_CODE:,} bytes"
        raise SafetyError(Problem(what, where=str(folder), fix="don't use this model"))
    digest = hashlib.sha256(json.dumps(_auto_map(folder), sort_keys=True).encode())
    for path in files:
        content = path.read_bytes()
        digest.update(f"\0{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:40]


def to_trust(repo: str, folder: Path, revision: str | None) -> str:
    """What the user would have to give, once the code has been read."""
    return f"{FLAG} {repo}@{revision or code_digest(folder)}"


def _named(flag: str) -> Named:
    repo, at, commit = flag.rpartition("@")
    if not (repo and at and COMMIT.fullmatch(commit)):
        what = f"`{FLAG} {flag}` names no full commit"
        fix = f"write `{FLAG} REPO@COMMIT` with all 40 digits of the commit whose code you have read"
        raise RecipeError(Problem(what, fix=fix))
    return Named(repo, commit)


def _same(named: str, repo: str, folder: Path) -> bool:
    return named == repo or (Path(named).is_dir() and Path(named).resolve() == folder.resolve())


def _auto_map(folder: Path) -> object:
    return read_json(folder / "config.json").get(AUTO_MAP)


def _refuse_code_elsewhere(folder: Path) -> None:
    found = _auto_map(folder)
    classes = found.values() if isinstance(found, dict) else [found]
    for name in classes:
        if not isinstance(name, str) or not OWN_CLASS.fullmatch(name):
            what = f"its `{AUTO_MAP}` names {name!r}, which is no class of its own files"
            raise SafetyError(
                Problem(what, where=str(folder / "config.json"), fix="don't use it; no other code was named")
            )
