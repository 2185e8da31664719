"""What no run of `lora` does: unpickle, run text as code, connect, start processes, or show a secret. And that we would see it."""

import ast
import json
import os
import pickle
import socket
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
from hostile_files import CANARY, Payload, watched
from packaging.requirements import Requirement
from running import ROOT, lora, lora_process, write_recipe  # noqa: F401  `lora` is a fixture
from tiny import tiny_base

from lora_cli.cli.floors import FLOORS
from lora_cli.models.base import HUB_FILES, HUB_LEFT_OUT, HUB_WEIGHTS, resolve_base

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECRETS = {"HF_TOKEN": CANARY, "WANDB_API_KEY": f"{CANARY}0123456789", "AWS_SECRET_ACCESS_KEY": CANARY[::-1]}

# Every command on a base and rows, in one process whose deeds are written down
RUN = """
import json, sys
deeds = []
NEVER = {"pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"}

def hook(event, arguments):
    if event in NEVER:
        deeds.append([event, repr(arguments)[:300]])
    elif event in ("exec", "compile") and "/lora_cli/" in sys._getframe(1).f_code.co_filename:
        deeds.append([event, repr(arguments)[:300]])

sys.addaudithook(hook)
from lora_cli.cli.main import main

codes = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["lora", *arguments]
    try:
        main()
    except SystemExit as end:
        codes.append(end.code or 0)
print(json.dumps({"codes": codes, "deeds": deeds}), file=sys.stderr)
"""
COMMANDS = [
    ["schema"],
    ["params", "recipe.yaml"],
    ["check", "recipe.yaml"],
    ["data", "recipe.yaml"],
    ["train", "recipe.yaml"],
    ["train", "recipe.yaml", "--resume", "--set", "training.keep_checkpoints=3"],
    ["eval", "recipe.yaml"],
    ["generate", "--adapter", "out", "--prompt", "what"],
    ["merge", "--adapter", "out", "--out", "merged"],
    ["unmerge", "--merged", "merged", "--adapter", "out", "--out", "unmerged"],
    ["export", "--adapter", "out", "--to", "peft", "--out", "exported"],
    ["doctor"],
]
# What the libraries start to learn about the machine
ABOUT_THE_MACHINE = ("uname", "lscpu", "nvidia-smi", "ldconfig", "gcc", "cc", "which")


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A folder in which every command has run, and what they said."""
    folder = tmp_path_factory.mktemp("work")
    tiny_base(folder / "base")
    write_recipe(folder, Path("base"), {"output": "out", "data.eval": "25%", "training.save_steps": 2})
    (folder / "run.py").write_text(RUN)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "run.py", json.dumps(COMMANDS)],
        cwd=folder,
        env=environment | SECRETS | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder, done


def test_no_command_unpickles_connects_runs_text_or_starts_a_program(everything):
    _, done = everything
    told = json.loads(done.stderr.splitlines()[-1])

    assert told["codes"] == [0] * len(COMMANDS), done.stderr
    others = [deed for deed in told["deeds"] if not any(f"'{name}" in deed[1] for name in ABOUT_THE_MACHINE)]
    assert others == []


def test_no_secret_of_the_environment_is_written_or_shown(everything):
    folder, done = everything
    files = [file for file in folder.rglob("*") if file.is_file()]

    assert len(files) > 20
    for secret in SECRETS.values():
        assert secret not in done.stdout + done.stderr
        assert [file for file in files if secret.encode() in file.read_bytes()] == []


def test_no_pickle_is_written(everything):
    folder, _ = everything

    endings = {file.suffix for file in folder.rglob("*") if file.is_file()} - {".py", ".pyc"}
    assert endings <= {".json", ".jsonl", ".jinja", ".lock", ".md", ".safetensors", ".yaml", ".html"}


def test_a_secret_that_stands_in_foreign_text_is_not_shown(lora, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", CANARY)

    done = lora("train", tmp_path / f"{CANARY}.yaml", code=2)
    debugged = lora("train", tmp_path / f"{CANARY}.yaml", "--debug", code=2)

    assert CANARY not in done.err + debugged.err
    assert "….yaml" in done.err


# --- that we would see it


def unpickle(folder: Path) -> None:
    pickle.loads(pickle.dumps(Payload()))


def start(folder: Path) -> None:
    subprocess.run(["true"], check=True)


def connect(folder: Path) -> None:
    with socket.socket() as ours, pytest.raises(OSError, match="refused"):
        ours.connect(("127.0.0.1", 1))


def run_text(folder: Path) -> None:
    exec(compile("1", str(folder / "evil.py"), "exec"))


def import_file(folder: Path) -> None:
    (folder / "evil_module.py").write_text("")
    sys.path.insert(0, str(folder))
    import evil_module  # noqa: F401

    sys.path.remove(str(folder))


@pytest.mark.parametrize("deed", [unpickle, start, connect, run_text, import_file])
def test_the_watch_over_hostile_files_sees(deed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with watched(tmp_path) as seen:
        assert seen == []
        deed(tmp_path)

    assert seen


# --- versions


def test_the_floors_are_those_of_the_package():
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    asked = {found.name: found.specifier for found in map(Requirement, listed)}

    assert {name: str(asked[name]) for name in FLOORS} == {name: f">={floor}" for name, floor in FLOORS.items()}


@pytest.mark.parametrize(("name", "version"), [("jinja2", "3.1.5"), ("torch", "2.9.1+cpu"), ("transformers", "5.2.0")])
def test_a_library_below_its_floor_is_handed_no_file(tmp_path, name, version):
    (tmp_path / f"{name}-{version}.dist-info").mkdir()
    (tmp_path / f"{name}-{version}.dist-info/METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    there = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}

    refused = lora_process("train", "none.yaml", code=4, folder=tmp_path, **there)

    floor = FLOORS[name]
    assert refused.err == (
        f"error: {name} {version} is too old to be handed files from elsewhere: {floor} is the least\n"
        f"  fix: pip install '{name}>={floor}'\n"
    )
    assert lora_process("train", "--help", folder=tmp_path, **there).out


# --- downloads

WANTED = ("config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "chat_template.jinja", "merges.txt")
NOT_WANTED = ("pytorch_model.bin", "modeling_evil.py", "model.pt", "x.pkl", "onnx/model.onnx", "adapter_config.json")


def test_of_the_hub_only_known_kinds_of_files_come_and_the_whole_commit_is_kept(tmp_path, monkeypatch):
    snapshot = tiny_base(tmp_path / "snapshots" / COMMIT)
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: asked.update(how) or str(snapshot))

    base = resolve_base("someone/model", "main")

    assert base.revision == COMMIT
    assert asked["allow_patterns"] == [*HUB_FILES, HUB_WEIGHTS]

    def comes(file: str) -> bool:
        return any(fnmatch(file, p) for p in asked["allow_patterns"]) and not any(
            fnmatch(file, p) for p in asked["ignore_patterns"]
        )

    assert asked["ignore_patterns"] == HUB_LEFT_OUT
    assert all(map(comes, WANTED))
    assert not any(map(comes, NOT_WANTED))


# --- the source

SOURCES = sorted((ROOT / "lora_cli").rglob("*.py"))
CALLS = ("np.load", "numpy.load", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "input")
LOOSE = {
    "shell": True,
    "trust_remote_code": True,
    "allow_pickle": True,
    "weights_only": False,
    "use_safetensors": False,
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_call_loosens_what_keeps_foreign_files_from_running(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]

    assert not {ast.unparse(call.func) for call in calls} & set(CALLS)
    given = {
        (word.arg, word.value.value) for call in calls for word in call.keywords if isinstance(word.value, ast.Constant)
    }
    assert not given & set(LOOSE.items())


def test_every_load_of_a_model_or_tokenizer_says_that_foreign_code_is_not_run():
    loads = [
        call
        for path in SOURCES
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith((".from_pretrained", ".from_config"))
    ]

    assert len(loads) >= 5
    for call in loads:
        assert {"trust_remote_code", None} & {word.arg for word in call.keywords}, ast.unparse(call)
