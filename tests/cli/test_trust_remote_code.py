"""`--trust-remote-code REPO@COMMIT`: the code that a base brings runs where it was named in full, and nowhere else."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from hostile_files import change_json
from running import events
from tiny import tiny_base

from lora_cli.models.trust import code_digest

CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""
MODELING = """
from pathlib import Path
Path({witness!r}).touch()
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True, scope="module")
def _modules(tmp_path_factory):
    """transformers copies the code to where it imports it from, and puts that on Python's path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr("sys.path", [*sys.path])
        yield


@pytest.fixture
def witness(tmp_path):
    """There once the code has run."""
    return tmp_path / "it-ran"


@pytest.fixture
def base(tmp_path, witness):
    folder = tiny_base(tmp_path / "base")
    change_json(folder / "config.json", model_type="own_llama", auto_map=AUTO_MAP)
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING.format(witness=str(witness)))
    return folder


def trusting(base: Path) -> tuple[str, str]:
    return "--trust-remote-code", f"{base}@{code_digest(base)}"


def test_what_is_named_is_trained_measured_and_merged(base, witness, lora, recipe, tmp_path):
    file, trust = recipe({"data.eval": "25%"}, base=base), trusting(base)

    done = lora("train", file, *trust)

    assert witness.exists()
    said = f"warning: --trust-remote-code: code of {base} is run: configuration_own.py, modeling_own.py\n"
    assert said in done.err
    assert events(tmp_path / "out", "finished")
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["loosened"] == [" ".join(trust)]
    merged, back = tmp_path / "out/merged", tmp_path / "back"
    lora("eval", file, "--adapter", tmp_path / "out", *trust)
    lora("generate", "--adapter", tmp_path / "out", "--prompt", "what", *trust)
    lora("merge", "--adapter", tmp_path / "out", *trust)  # and its proof loads what was written
    assert (merged / "modeling_own.py").read_bytes() == (base / "modeling_own.py").read_bytes()
    lora("check", file, "--set", f"model.base={merged}", code=9)
    lora("check", file, "--set", f"model.base={merged}", *trusting(merged))
    lora("unmerge", "--merged", merged, "--adapter", tmp_path / "out", "--out", back, *trusting(merged))
    assert code_digest(base) == code_digest(merged) == code_digest(back)


def test_without_the_flag_it_is_refused_with_what_to_give(base, witness, lora, recipe, tmp_path):
    done = lora("train", recipe(base=base), code=9)

    assert not witness.exists()
    assert f"`--trust-remote-code {base}@{code_digest(base)}`" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flag",
    ["", "base", "base@main", "base@0123456", f"base@{COMMIT.upper()}", f"@{COMMIT}", f"base@{COMMIT}0"],
)
def test_a_flag_without_a_full_commit_is_exit_2(flag, base, lora, recipe):
    done = lora("train", recipe(base=base), "--trust-remote-code", flag, code=2)

    assert "names no full commit" in done.err


def other_commit(base: Path) -> str:
    return f"{base}@{COMMIT}"


def other_repository(base: Path) -> str:
    return f"someone/else@{code_digest(base)}"


def changed_since(base: Path) -> str:
    named = f"{base}@{code_digest(base)}"
    with (base / "configuration_own.py").open("a") as code:
        code.write("\n# one more line\n")
    return named


def one_more_file(base: Path) -> str:
    named = f"{base}@{code_digest(base)}"
    (base / "more").mkdir()
    (base / "more/code.py").write_text("")
    return named


@pytest.mark.parametrize("flag", [other_commit, other_repository, changed_since, one_more_file])
@pytest.mark.parametrize("command", ["train", "check", "data"])
def test_what_was_not_named_does_not_run(flag, command, base, witness, lora, recipe):
    file = recipe(base=base)

    lora(command, file, "--trust-remote-code", flag(base), code=9)

    assert not witness.exists()


@pytest.mark.parametrize(
    "changed",
    [
        {"auto_map": AUTO_MAP | {"AutoModelForCausalLM": "someone/else--modeling_own.OwnForCausalLM"}},
        {"auto_map": AUTO_MAP | {"AutoModelForCausalLM": "../modeling_own.OwnForCausalLM"}},
        {"auto_map": "modeling_own"},
        {"custom_generate": "someone/else"},
        {"_attn_implementation_internal": "someone/kernels"},
    ],
    ids=["another repository", "a path", "no class", "custom_generate", "attention"],
)
def test_what_else_it_asks_for_stays_refused(changed, base, witness, lora, recipe):
    change_json(base / "config.json", **changed)

    lora("train", recipe(base=base), *trusting(base), code=9)

    assert not witness.exists()


def test_it_holds_for_one_command(base, lora, recipe, tmp_path):
    lora("train", recipe(base=base), *trusting(base))

    lora("eval", recipe(base=base), "--adapter", tmp_path / "out", code=9)


def test_where_transformers_has_the_architecture_its_own_is_used(base, witness, lora, recipe):
    change_json(base / "config.json", model_type="llama")

    done = lora("train", recipe(base=base), *trusting(base))

    assert "brings its own code (`auto_map`): ignored, transformers' own `llama` is used" in done.err
    assert not witness.exists()


def test_a_base_of_the_hub_is_taken_at_the_commit_that_was_named(base, witness, lora, recipe, tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    snapshot = cache / "models--some--model/snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    shutil.move(base, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    file = recipe(base="some/model")

    lora("train", file, code=4)  # no branch is in the cache
    lora("train", file, "--set", f"model.revision={COMMIT}", code=9)
    lora("train", file, "--trust-remote-code", f"some/other@{COMMIT}", "--set", f"model.revision={COMMIT}", code=9)
    assert not witness.exists()
    lora("train", file, "--trust-remote-code", f"some/model@{COMMIT}")

    assert witness.exists()
    assert json.loads((tmp_path / "out/run.json").read_text())["base"]["revision"] == COMMIT
