"""Recipes, overrides and launch profiles from someone who means harm: refused before torch is imported."""

from pathlib import Path

import pytest
from hostile_files import CANARY, TERMINAL, refused
from running import ROOT, lora, lora_process  # noqa: F401  `lora` is a fixture

LEAST = "model: {base: m}\ndata: {train: d.jsonl}\n"
LAUGHS = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)

# name: (what the file holds, exit code, what is said)
RECIPES = {
    "a tag that calls a function": (LEAST + "output: !!python/object/apply:os.system ['id']\n", 9, "YAML tag"),
    "a tag of our own": ("!include /etc/passwd\n", 9, "YAML tag"),
    "a tag deep inside": (LEAST + "lora: {targets: [q, !!python/name:os.system x]}\n", 9, "YAML tag"),
    "a tag on a key": (LEAST + "? !!python/tuple [a]\n: b\n", 9, "YAML tag"),
    "a billion laughs": (LAUGHS + LEAST, 9, "counting what aliases repeat"),
    "an alias inside itself": ("a: &a [*a]\n" + LEAST, 9, "levels"),
    "ten thousand levels": ("[" * 10_000, 9, "at most 50 levels"),
    "levels by indentation": ("".join(f"{' ' * i}a:\n" for i in range(200)), 9, "at most 50 levels"),
    "too many values": ("a: [" + "1," * 10_001 + "]\n", 9, "at most 10,000 values"),
    "more than a megabyte": ("# " + "x" * 1_000_000, 9, "at most 1 MB"),
    "a second document": (LEAST + "---\n" + LEAST, 2, "a second one starts here"),
    "a key twice": (LEAST + LEAST, 2, "`model` is given twice"),
    "a merge key": ("x: &x {r: 1}\nlora: {<<: *x}\n" + LEAST, 2, "is not a recipe key"),
    "a list as a key": (LEAST + "? [a]\n: b\n", 2, "a key must be a word"),
    "a NUL": ("model: {base: 'a\0b'}\n", 2, "U+0000"),
    "an escape character": (f"model: {{base: '{TERMINAL}'}}\n", 2, "U+001B"),
    "escapes that YAML writes out": (
        LEAST + 'lora: {init: "\\e[2J\\a\\u202e"}\n',
        2,
        "\\x1b[2J\\x07\\u202e",
    ),
    "an escape in a key": (LEAST + '"\\e[2J\\u202e": 1\n', 2, "\\x1b[2J\\u202e"),
    "bytes that are no text": (b"model: \xff\xfe", 2, "not UTF-8"),
    "UTF-16": (LEAST.encode("utf-16"), 2, "not UTF-8"),
    "a secret at the top": (LEAST + f"hf_token: {CANARY}\n", 2, "`hf_token` looks like a secret"),
    "a secret in a block": (f"model: {{base: m, api-key: {CANARY}}}\ndata: {{train: d}}\n", 2, "looks like a secret"),
    "a secret on several lines": (LEAST + f"password:\n  - {CANARY}\n", 2, "looks like a secret"),
    "a secret in a value of the wrong type": (LEAST + f"lora: {{r: {CANARY}}}\n", 2, "`lora.r`"),
    "a secret beside a mistake": (LEAST + f"wandb: {{api_key: {CANARY}}}\n", 2, "`wandb` is not a recipe key"),
    "Hydra's target": (LEAST + "lora: {_target_: os.system}\n", 2, "is not a recipe key"),
    "a dunder": (LEAST + "lora: {__class__: {__init__: 1}}\n", 2, "is not a recipe key"),
    "a key without end": ("a" * 900_000 + ": 1\n" + LEAST, 2, "not valid YAML"),
    "a number without end": (LEAST + f"lora: {{r: {'9' * 100_000}}}\n", 2, "`lora.r`"),
    "a learning rate that is no number": (LEAST + "training: {learning_rate: .nan}\n", 2, "`training.learning_rate`"),
    "a rank below zero": (LEAST + "lora: {r: -99999999999999999999}\n", 2, "`lora.r`"),
    "a template that is not closed": (LEAST.replace("d.jsonl", "d.jsonl, template: '[[{a}'"), 2, "`data.template`"),
    "a list": ("- a\n- b\n", 2, "this is a list"),
    "nothing": ("", 2, "the recipe is empty"),
}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def written(content: str | bytes, name: str = "recipe.yaml") -> Path:
    file = Path(name)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.parametrize("case", RECIPES)
def test_a_hostile_recipe_is_refused(lora, tmp_path, case):  # noqa: F811
    content, code, says = RECIPES[case]

    refused(lora, "train", written(content), folder=tmp_path, code=code, says=says)


OVERRIDES = {
    "a dunder": ("__class__.__init__=x", 2, "is not the name of a recipe key"),
    "a dunder inside": ("lora.__class__=x", 2, "is not the name of a recipe key"),
    "a tag": ("lora.r=!!python/object/apply:os.system [id]", 9, "YAML tag"),
    "a secret": (f"model.hf_token={CANARY}", 2, "looks like a secret"),
    "a secret without a key": (f"token={CANARY}", 2, "looks like a secret"),
    "a name for the terminal": (f"{TERMINAL}=1", 2, "is not the name of a recipe key"),
    "a bomb": ("lora.targets=" + "[" * 1000, 9, "at most 50 levels"),
    "a path": ("../../lora.r=1", 2, "is not the name of a recipe key"),
    "a target": ("lora._target_=os.system", 2, "is not the name of a recipe key"),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_a_hostile_override_is_refused(lora, tmp_path, case):  # noqa: F811
    text, code, says = OVERRIDES[case]

    refused(lora, "train", written(LEAST), "--set", text, folder=tmp_path, code=code, says=says)


PROFILES = {
    "a tag": ("num_processes: !!python/object/apply:os.system [id]\n", 9, "YAML tag"),
    "laughs": (LAUGHS, 9, "counting what aliases repeat"),
    "a command": ("main_process_ip: host\ncommand_file: [rm, -rf]\n", 2, "is not known here"),
    "a terminal": ('"\\e[2J": 1\n', 2, "\\x1b[2J"),
    "large": ("# " + "x" * 1_000_000, 9, "at most 1 MB"),
}


@pytest.mark.parametrize("case", PROFILES)
def test_a_hostile_launch_profile_is_refused(lora, tmp_path, case):  # noqa: F811
    content, code, says = PROFILES[case]
    profile = written(content, "profile.yaml")

    refused(lora, "train", written(LEAST), "--on", profile, folder=tmp_path, code=code, says=says)


def test_a_device_is_read_as_far_as_a_recipe_may_go(lora, tmp_path):  # noqa: F811
    refused(lora, "train", "/dev/zero", folder=tmp_path, code=9, says="at most 1 MB")


def test_a_name_for_the_terminal_is_shown_inert(lora, tmp_path):  # noqa: F811
    name = TERMINAL.replace("/", ":")

    refused(lora, "train", written("- a", f"{name}.yaml"), folder=tmp_path, code=2, says="\\x1b[2J")
    refused(lora, "train", f"{name}.none", folder=tmp_path, code=2, says="\\x1b[2J")


@pytest.mark.parametrize("case", ["a tag deep inside", "a billion laughs", "a secret in a block"])
def test_a_hostile_recipe_is_answered_without_torch(tmp_path, case):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nclass No:\n    def find_spec(self, name, *_):\n        assert name not in ('torch', 'transformers'), name\n"
        "sys.meta_path.insert(0, No())\n"
    )

    done = lora_process(
        "train", written(RECIPES[case][0]), code=RECIPES[case][1], folder=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}"
    )

    assert RECIPES[case][2] in done.err
