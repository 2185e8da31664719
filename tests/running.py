"""Runs of `lora` in a test: rows and recipes on disk, the command in this process or in one of its own."""

import faulthandler
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import tiny_base
from torch import Tensor

ROOT = Path(__file__).parents[1]
SUBJECTS = ["cat", "mat", "answer", "question", "hat", "that", "what", "sat"]


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        """stdout, which is one JSON document and nothing else."""
        return json.loads(self.out)


def write_rows(file: Path, count: int = 12) -> Path:
    """Prompts with answers of different lengths."""
    rows = [
        {"prompt": f"what is the {SUBJECTS[i % 8]} {i}?", "completion": f" the {SUBJECTS[i * 5 % 8]}" * (1 + i % 4)}
        for i in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_labelled(file: Path, count: int = 24) -> Path:
    """Texts of different lengths with one of three labels, which a word in them gives away."""
    labels = ["animal", "place", "thing"]
    words = {"animal": "cat", "place": "mat", "thing": "hat"}
    rows = [
        {"text": f"{words[labels[i % 3]]} " * (2 + i // 3 % 4) + str(i), "label": labels[i % 3]} for i in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_recipe(folder: Path, base: Path, settings: Mapping[str, object] | None = None) -> Path:
    """A recipe beside its rows: a few steps in float32, without warm-up; `settings` by dotted key change it."""
    write_rows(folder / "train.jsonl")
    recipe: dict = {"output": str(folder / "out")}
    defaults = {
        "model.base": str(base),
        "model.dtype": "float32",
        "lora.r": 4,
        "lora.targets": "all-linear",
        "data.train": "train.jsonl",
        "data.max_length": 128,
        "training.max_steps": 4,
        "training.global_batch_size": 4,
        "training.learning_rate": 0.02,
        "training.warmup_ratio": 0.0,
    }
    for key, value in (defaults | dict(settings or {})).items():
        block, _, name = key.rpartition(".")
        (recipe.setdefault(block, {}) if block else recipe)[name] = value
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture
def recipe(tmp_path, tiny_llama):
    """recipe({"lora.r": 8, …}) -> a recipe of the tiny Llama in this test's folder; its run folder is `out`."""

    def write(settings=None, *, base=tiny_llama):
        return write_recipe(tmp_path, base, settings)

    return write


@pytest.fixture
def lora(monkeypatch, capsys):
    """lora("train", recipe, …, code=0) -> Done: the command line in this process, with warnings as errors."""
    from lora_cli.cli.main import main

    def run(*arguments: object, code: int | None = 0) -> Done:
        monkeypatch.setattr(sys, "argv", ["lora", *map(str, arguments)])
        capsys.readouterr()
        inherited = dict(os.environ)  # a launcher tells its workers more
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            os.environ.clear()
            os.environ.update(inherited)
        done = Done(ended.value.code or 0, *capsys.readouterr())
        assert code is None or done.code == code, f"exit {done.code}\n{done.out}\n{done.err}"
        return done

    return run


def lora_process(*arguments: object, code: int | None = 0, folder: Path | None = None, **environment: str) -> Done:
    """The command as a person starts it, in a process of its own."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "lora_cli", *map(str, arguments)],
        env=inherited | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert code is None or done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return Done(done.returncode, done.stdout, done.stderr)


def lora_workers(
    count: int,
    *arguments: object,
    code: int | None = 0,
    before: Callable[[int], None] | None = None,
    **environment: str,
) -> list[Done]:
    """The command as `count` workers of one run, as torchrun would start them, forked from this process: that spares
    each the imports. `before(rank)` runs in a worker first; `code` is that of all."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on: a fork beside threads
        shared = environment | {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        pids = []
        for rank in range(count):
            if (pid := os.fork()) == 0:
                numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
                _work(arguments, shared | numbers, Path(folder, str(rank)), before)
            pids.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        ended = [
            Done(codes[rank], *(Path(folder, f"{rank}{stream}").read_text() for stream in (".out", ".err")))
            for rank in range(count)
        ]
    assert code is None or codes == [code] * count, "\n".join(
        f"exit {done.code}\n{done.out}\n{done.err}" for done in ended
    )
    return ended


def resumed_after(step: int, folder: Path, recipe: Path, lora: Callable, *arguments: object) -> None:
    """Take a finished run back to a checkpoint, as if it had been killed behind it, and resume it."""
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    for name in ("adapter_config.json", "adapter_model.safetensors", "config.json", "model.safetensors"):
        (folder / name).unlink(missing_ok=True)
    lora("train", recipe, "--resume", *arguments)


def trained_and_resumed(recipe: Path, out: Path, lora: Callable) -> tuple[dict, dict]:
    """Train; what is learned must help, and be the same bytes after a stop at step 2. Returns both evaluations."""
    lora("train", recipe)
    first, last = events(out, "evaluated")
    assert last["loss"] < first["loss"]
    straight = adapter_bytes(out)
    resumed_after(2, out, recipe, lora)
    assert adapter_bytes(out) == straight
    return first, last


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def _work(arguments, environment: dict[str, str], output: Path, before) -> None:
    """Never returns: what the parent would do next is not this process's business."""
    code = 70
    try:
        from accelerate.state import AcceleratorState, GradientState

        from lora_cli.cli.main import main

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        sys.stdout, sys.stderr = (output.with_suffix(end).open("w", buffering=1) for end in (".out", ".err"))
        os.environ.update(environment)
        # behind a fork torch makes its pool of threads anew: here, before the threads that load a model race for it
        torch.set_num_threads(torch.get_num_threads())
        faulthandler.dump_traceback_later(120, exit=True, file=sys.stderr)
        sys.argv = ["lora", *map(str, arguments)]
        if before:
            before(int(environment["RANK"]))
        main()
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def events(out: Path, kind: str | None = None) -> list[dict]:
    """The lines of events.jsonl, as strict JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    found = [json.loads(line, parse_constant=refuse) for line in (out / "events.jsonl").read_text().splitlines()]
    return [event for event in found if kind in (None, event["event"])]


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "adapter_model.safetensors")


def adapter_bytes(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}


def hashes(folder: Path) -> dict[str, str]:
    """Every file below a folder, by the hash of its bytes, but for the lock, which says who was there last."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != "run.lock")
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
