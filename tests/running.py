"""Runs of `lora` in a test: rows and recipes on disk, the command in this process or in one of its own."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
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
        with pytest.raises(SystemExit) as ended:
            main()
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
