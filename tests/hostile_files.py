"""Hostile files made by code, and what must hold whatever a command is handed: the oracle of tests/hostile."""

import json
import signal
import struct
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from running import Done, hashes

MOST_LINES = 12
MOST_SECONDS = 120  # a hang, not a measurement
TERMINAL = (
    "\x1b[2J\x1b]8;;http://evil\x07\x9b31m\u202e[/bold][link=x]"  # clears the screen, hides a link, turns the text
)
PWNED = "import pathlib; pathlib.Path('pwned').touch()"
CANARY = "hf_canaryCanaryCanaryCanary"


class Payload:
    """A pickle that runs PWNED when it is read."""

    def __reduce__(self):
        return exec, (PWNED,)


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """What Python does on the way that no foreign file may bring about, with `folder` as theirs."""
    _seen.clear()
    _watching[:] = [str(folder)]
    try:
        yield _seen
    finally:
        _watching.clear()


_watching: list[str] = []
_seen: list[str] = []
NEVER = (
    "pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn",
    "socket.connect", "socket.getaddrinfo", "urllib.Request", "webbrowser.open",
)  # fmt: skip
RUNS = ("compile", "exec", "import", "ctypes.dlopen")


def _hook(event: str, arguments: tuple) -> None:
    theirs = event in RUNS and any(folder in str(arguments) for folder in _watching)
    if _watching and (event in NEVER or theirs):
        _seen.append(f"{event} {arguments!r:.200}")


sys.addaudithook(_hook)


def refused(lora, *arguments: object, folder: Path, code: int, says: str) -> Done:
    """Run a command on hostile files that must end with `code` and one block that says what, where and how to put it
    right; every file in `folder` stays as it was."""
    before = hashes(folder)
    with watched(folder) as seen, _ends():
        done = lora(*arguments, code=None)
    assert done.code == code, f"exit {done.code}\n{done.out}\n{done.err}"
    block = done.err[done.err.index("error: ") :] if "error: " in done.err else ""
    assert says in block, done.err
    assert "fix: " in block or "rows cannot be used:" in block, done.err
    assert len(block.rstrip("\n").splitlines()) <= MOST_LINES, done.err
    assert max(map(len, block.splitlines())) < 2000, "a line that no one reads"
    assert hashes(folder) == before, "a file was written or changed"
    harmless(done, seen)
    return done


def harmless(done: Done, seen: list[str]) -> None:
    """No traceback, no control bytes, no secret; no code but ours ran."""
    text = done.out + done.err
    assert "Traceback" not in text
    assert [c for c in text if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf", "Cs")] == []
    assert CANARY not in text
    assert not seen
    assert not Path("pwned").exists()


@contextmanager
def _ends() -> Iterator[None]:
    def hang(*_: object) -> None:
        raise TimeoutError(f"no end after {MOST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(MOST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def change_json(file: Path, **changed: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def safetensors_file(header: Mapping | bytes, data: bytes = b"") -> bytes:
    """A safetensors file of any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def change_header(file: Path, change) -> None:
    """Let `change` rewrite the header of a safetensors file; the data stays."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    file.write_bytes(safetensors_file(change(header) or header, content[end:]))


def deep(levels: int = 100_000) -> str:
    return '{"a":' * levels + "1" + "}" * levels


def link_out(file: Path, target: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to(target)
