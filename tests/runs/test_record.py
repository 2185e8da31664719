"""run.json: what a run was made from, what it ran on and what came of it; never a secret."""

import json
from hashlib import sha256
from importlib.metadata import version

import pytest
from running import hashes

from lora_cli.runs.record import ENVIRONMENT

CANARIES = {
    "HF_TOKEN": "hf_canaryCanaryCanary0001",
    "WANDB_API_KEY": "canary0002canary0002canary0002",
    "MLFLOW_TRACKING_PASSWORD": "canary-0003",
    "AWS_SECRET_ACCESS_KEY": "canary/0004/canary",
    "OPENAI_API_KEY": "sk-canary0005canary0005",
    "GITHUB_TOKEN": "ghp_canary0006canary0006",
}


@pytest.fixture
def record(lora, recipe, tmp_path):
    """record({"lora.r": 8, …}, *arguments) -> run.json of a run."""

    def run(settings=None, *arguments):
        lora("train", recipe(settings), *arguments)
        return json.loads((tmp_path / "out/run.json").read_text())

    return run


def test_the_record_says_what_ran_on_what(record, tmp_path):
    found = record({"data.eval": "25%"}, "--set", "lora.r=8")

    assert found["sessions"][0]["command"] == ["lora", "train", str(tmp_path / "recipe.yaml"), "--set", "lora.r=8"]
    assert found["settings"]["lora.r"] == 8
    assert found["origins"]["lora.r"] == "--set"
    for name in ("torch", "transformers", "accelerate", "tokenizers", "safetensors"):
        assert found["machine"]["versions"][name] == version(name)
    assert found["environment"]["OMP_NUM_THREADS"] == "1"
    rows = (tmp_path / "train.jsonl").read_bytes()
    assert found["data"]["files"]["train.jsonl"] == {"bytes": len(rows), "sha256": sha256(rows).hexdigest()}
    assert len(found["tokenizer"]["fingerprint"]) == 64
    assert found["loosened"] == []


def test_the_record_says_what_came_of_it(record, tmp_path):
    found = record({"data.eval": "25%", "training.eval_steps": 2})

    events = [json.loads(line) for line in (tmp_path / "out/events.jsonl").read_text().splitlines()]
    held_out = [event["loss"] for event in events if event["event"] == "evaluated"]
    result = found["result"]
    assert result["steps"] == 4
    assert result["reason"] == "all steps"
    assert result["held_out_loss"] == {"first": held_out[0], "last": held_out[-1], "best": min(held_out)}
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert result["train_loss"] == pytest.approx(sum(losses) / len(losses))
    assert result["peak_bytes"] == events[-1]["peak_bytes"]
    assert 0 < found["resolved"]["filled"] <= 1


def test_the_example_is_a_row_as_it_is_trained(record):
    example = record()["data"]["example"]

    text = "".join(example["texts"])
    learned = "".join(text for text, weight in zip(example["texts"], example["weights"], strict=True) if weight)
    assert text.removeprefix("<s>").startswith("what is the cat 0?")
    assert learned.startswith(" the cat")
    assert example["row"] == "train.jsonl:1"


def test_no_secret_of_the_environment_is_written_or_printed(lora, recipe, tmp_path, monkeypatch):
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", CANARIES["HF_TOKEN"])  # in a place that the record repeats
    settings = {"training.trackers": ["tensorboard"], "training.sample_prompts": ["what"], "data.eval": "25%"}

    done = lora("train", recipe(settings), "--set", f"output={tmp_path / 'out'}")
    failed = lora("train", recipe(settings), "--set", f"lora.api_key={CANARIES['HF_TOKEN']}", code=2)

    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(files) > 10
    seen = [done.out, done.err, failed.out, failed.err, *(file.read_bytes().decode("latin-1") for file in files)]
    assert not [value for value in CANARIES.values() if any(value in text for text in seen)]


def test_of_the_environment_only_what_is_listed_is_written(record, monkeypatch):
    monkeypatch.setenv("ANOTHER_VARIABLE", "plain")

    assert set(record()["environment"]) <= set(ENVIRONMENT)


def test_a_secret_on_the_command_line_is_hidden(monkeypatch):
    from lora_cli.recipe.secrets import redacted_command

    monkeypatch.setenv("MY_API_KEY", "not-to-be-seen")
    arguments = ["train", "--set", "x.api_key=abc", "--token=abc", "hf_" + "a" * 20, "at not-to-be-seen", "lora.r=8"]

    assert redacted_command(arguments) == ["train", "--set", "x.api_key=…", "--token=…", "…", "at …", "lora.r=8"]


def test_secrets_are_hidden_in_keys_and_values_and_nothing_else_is(monkeypatch):
    from lora_cli.recipe.secrets import redacted

    monkeypatch.setenv("A_TOKEN", "secret-word")
    monkeypatch.setenv("SHORT_TOKEN", "the")
    monkeypatch.setenv("A_PATH", "plain-word")

    found = redacted({"secret-word": ["the secret-word", 1, None], "b": "plain-word <eos_token>"})

    assert found == {"…": ["the …", 1, None], "b": "plain-word <eos_token>"}


@pytest.mark.parametrize(
    ("arguments", "loosened"),
    [
        (["train", "r.yaml", "--allow-change", "lora.dropout"], ["--allow-change lora.dropout"]),
        (["train", "r.yaml", "--trust-remote-code=a/b@c"], ["--trust-remote-code a/b@c"]),
        (["eval", "--allow-base-mismatch", "r.yaml"], ["--allow-base-mismatch"]),
        (["train", "r.yaml"], []),
    ],
)
def test_flags_that_loosen_a_promise_are_named(arguments, loosened, monkeypatch):
    from lora_cli.runs import record

    monkeypatch.setattr("sys.argv", ["lora", *arguments])

    assert record.loosened_by_command() == loosened


def test_a_run_that_cannot_start_leaves_no_record(lora, recipe, tmp_path):
    lora("train", recipe({"model.base": "./nowhere"}), code=4)

    assert "out/run.json" not in hashes(tmp_path)


def test_a_run_with_a_missing_tracker_ends_before_it_begins(lora, recipe, monkeypatch, tmp_path):
    monkeypatch.setattr("lora_cli.train.trackers.find_spec", lambda name: None)

    done = lora("train", recipe({"training.trackers": ["trackio"]}), code=2)

    assert "`training.trackers: [trackio]` needs the package `trackio`" in done.err
    assert not (tmp_path / "out").exists()
