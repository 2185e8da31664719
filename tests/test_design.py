"""The rules of the house: floors, light start-up, recipes that read, keys that are used."""

import ast
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from lora_cli.cli.console import bytes_text
from lora_cli.cli.launch import run_as_workers
from lora_cli.recipe.reader import read_recipe
from lora_cli.recipe.schema import keys, labels_of
from lora_cli.runs.plan import plan

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lora_cli"
MODULES = sorted(PACKAGE.rglob("*.py"))
LAUNCH = ROOT / "configs" / "launch"
CONFIGS = sorted(set((ROOT / "configs").rglob("*.yaml")) - set(LAUNCH.rglob("*.yaml")))
RECIPES = [*CONFIGS, *sorted((ROOT / "recipes").rglob("*.yaml"))]


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_there_is_something_to_look_at():
    assert len(MODULES) > 60
    assert len(RECIPES) >= 15
    assert len(list(LAUNCH.rglob("*.yaml"))) >= 3


def test_imports_point_down_the_floors():
    found = run("-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache")

    assert found.returncode == 0, found.stdout + found.stderr


HEAVY = {
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "numpy",
    "safetensors",
    "yaml",
    "lora_cli.recipe",
}


# typer takes pydantic itself where it is installed, as soon as it looks at a command's options
@pytest.mark.parametrize(
    ("command", "heavy"),
    [(["--help"], {*HEAVY, "pydantic", "rich"}), (["train", "--help"], HEAVY), (["params", "--help"], HEAVY)],
    ids=["lora", "train", "params"],
)
def test_help_imports_nothing_heavy(command, heavy):
    code = (
        "import sys; from lora_cli.cli.main import main\n"
        f"sys.argv = ['lora', *{command!r}]\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print('heavy:', *sorted({heavy!r} & set(sys.modules)))"
    )

    lines = run("-c", code).stdout.splitlines()

    assert "Usage: lora" in "\n".join(lines)
    assert lines[-1] == "heavy:"


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_every_recipe_reads_without_problems(path):
    loaded = read_recipe(path)

    data = loaded.recipe.data
    for source in [data.train] if isinstance(data.train, str) else data.train:
        if source.endswith(".jsonl"):
            assert (path.parent / source).is_file()


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_config_opens_with_its_command_and_its_budget(path):
    text = path.read_text(encoding="utf-8")
    budget = json.loads(run("-m", "lora_cli", "params", str(path), "--json").stdout)
    method = "QLoRA (nf4)" if read_recipe(path).recipe.model.quantize == "nf4" else "LoRA"
    memory = next(row for row in budget["memory"] if row["name"] == method)
    weights, gradients, optimizer = (
        bytes_text(count)
        for count in (
            memory["base_bytes"] + memory["adapter_bytes"],
            memory["gradient_bytes"],
            memory["optimizer_bytes"],
        )
    )

    assert text.splitlines()[0] == f"# lora train {name_of(path)}"
    assert [line for line in text.splitlines() if re.match(r"# (trains|adapter|memory) ", line)] == [
        f"# trains   {budget['trainable']:,} of {budget['total']:,} parameters ({100 * budget['share']:.4f} %)",
        f"# adapter  {bytes_text(budget['adapter_bytes'])} on disk",
        f"# memory   {bytes_text(memory['total_bytes'])} for weights ({weights}), gradients ({gradients}) and optimizer "
        f"({optimizer}){_peak(path)}",
    ]


def _peak(path: Path) -> str:
    """What the config says behind weights and optimizer; a classifier's head has no formula to plan with."""
    loaded = read_recipe(path)
    if labels_of(loaded.recipe.training) is not None:
        return "; activations come on top"
    planned = plan(loaded, gpu="H100").ways[0]
    return f"; {bytes_text(planned.least)} with activations at least: {planned.smallest.name} (`lora plan`)"


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_config_names_the_schema_for_editors(path):
    [schema] = re.findall(r"^# yaml-language-server: \$schema=(.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)

    assert (path.parent / schema).resolve() == ROOT / "docs" / "recipe.schema.json"


@pytest.mark.parametrize("path", sorted(LAUNCH.rglob("*.yaml")), ids=name_of)
def test_every_launch_profile_is_one_that_lora_train_takes(path, monkeypatch):
    started = []
    monkeypatch.setattr("lora_cli.cli.launch._launch", lambda processes, *_: started.append(processes))

    run_as_workers(2 if path.stem in ("ddp", "fsdp2") else None, str(path))

    asked = yaml.safe_load(path.read_text(encoding="utf-8"))
    machines = asked["num_machines"]
    several = [asked.get("num_processes", 0) // machines]
    expected = {"single": [], "ddp": [2], "fsdp2": [2], "multinode": several, "fsdp2-multinode": several}
    assert started == expected[path.stem]


# Read where it is defined, as `effective_alpha`
READ_IN_RECIPE = {"lora.alpha"}


@pytest.mark.parametrize("key", keys())
def test_every_key_of_a_recipe_is_read_somewhere(key):
    name = key.rpartition(".")[2]
    in_recipe = PACKAGE / "recipe"
    elsewhere = [path for path in MODULES if key in READ_IN_RECIPE or not path.is_relative_to(in_recipe)]

    readers = [
        path
        for path in elsewhere
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and node.attr == name
    ]

    assert readers


@pytest.mark.parametrize("path", [path for path in MODULES if path.name == "__init__.py"], ids=name_of)
def test_packages_hold_nothing_but_the_version(path):
    names = [target.id for node in tree_of(path).body if isinstance(node, ast.Assign) for target in node.targets]
    others = [node for node in tree_of(path).body if not isinstance(node, (ast.Assign, ast.Expr))]

    assert names == (["__version__"] if path.parent == PACKAGE else [])
    assert not others


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_unpickles_or_runs_text(path):
    called = {ast.unparse(node.func) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)}
    imported = {
        module.split(".")[0]
        for node in ast.walk(tree_of(path))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for module in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }

    assert not called & {"torch.load", "eval", "exec", "compile", "__import__"}
    assert not imported & {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
