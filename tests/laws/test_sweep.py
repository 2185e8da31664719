"""A sweep through the command line: its runs are those that `lora train` makes, whatever becomes of their neighbours."""

import json
import shutil

import pytest
from running import adapter_bytes, events, hashes, resumed_after, write_labelled
from tiny import tiny_base, tiny_encoder

SHORT = {"training.max_steps": 3, "data.eval": "20%", "training.eval_steps": 1, "lora.dropout": 0.1}
GRID = ["--grid", "lora.r=2,4", "--grid", "training.seed=1,2"]
NAMES = ["r=2,seed=1", "r=2,seed=2", "r=4,seed=1", "r=4,seed=2"]


def test_each_run_is_the_one_that_train_makes(lora, recipe, tmp_path):
    file = recipe(SHORT)

    lora("sweep", file, *GRID)

    for name in (NAMES[0], NAMES[3]):
        r, seed = (part.partition("=")[2] for part in name.split(","))
        lora("train", file, "--set", f"lora.r={r}", "--set", f"training.seed={seed}", "--out", tmp_path / name)
        assert adapter_bytes(tmp_path / "out-sweep" / name) == adapter_bytes(tmp_path / name)
        assert (tmp_path / "out-sweep" / name / "report.html").is_file()


@pytest.mark.parametrize("kind", ["rows of tokens", "all biases", "classifiers under new heads"])
def test_runs_share_nothing_of_what_stands_beside_the_layers(kind, lora, recipe, tmp_path):
    """Hooks on a module of the base, and a head and pooler that are new, are each run's own."""
    write_labelled(tmp_path / "labelled.jsonl")
    base = {"all biases": "gpt2", "classifiers under new heads": "bert"}.get(kind, "llama")
    settings = {
        "rows of tokens": {"lora.trainable_tokens": ["?"]},
        "all biases": {"lora.bias": "all", "lora.targets": ["c_attn"]},
        "classifiers under new heads": {"training.objective": "classify", "data.train": "labelled.jsonl"},
    }[kind]
    make = tiny_encoder if base == "bert" else tiny_base
    file = recipe({"training.max_steps": 2} | settings, base=make(tmp_path / "base", base))

    lora("sweep", file, "--grid", "training.seed=1,2")

    for seed in (1, 2):
        lora("train", file, "--set", f"training.seed={seed}", "--out", tmp_path / str(seed))
        assert adapter_bytes(tmp_path / "out-sweep" / f"seed={seed}") == adapter_bytes(tmp_path / str(seed))


def test_the_table_has_the_lowest_held_out_loss_first(lora, recipe, tmp_path):
    done = lora("sweep", recipe(SHORT), *GRID, "--out", tmp_path / "sweep", "--json")

    runs = done.json["runs"]
    assert sorted(run["name"] for run in runs) == NAMES
    assert [run["loss"] for run in runs] == sorted(run["loss"] for run in runs)
    for run in runs:
        told = events(tmp_path / "sweep" / run["name"], "evaluated")
        assert run["loss"] == told[-1]["loss"]
        assert run["best_step"] == min(told[1:], key=lambda event: event["loss"])["step"]
    assert json.loads((tmp_path / "sweep/sweep.json").read_text()) == done.json


def test_a_sweep_that_was_killed_goes_on_to_the_same_bytes(lora, recipe, tmp_path):
    file = recipe(SHORT | {"training.save_steps": 1, "training.keep_checkpoints": 9})
    lora("sweep", file, *GRID)
    out = tmp_path / "out-sweep"
    whole = {name: adapter_bytes(out / name) for name in NAMES}
    finished = {name: hashes(out / name) for name in NAMES[:2]}

    shutil.rmtree(out / NAMES[3])  # not begun
    resumed_after(1, out / NAMES[2], file, lambda *arguments: lora("sweep", *arguments[1:]), *GRID)

    assert {name: adapter_bytes(out / name) for name in NAMES} == whole
    assert {name: hashes(out / name) for name in NAMES[:2]} == finished
    assert [event["step"] for event in events(out / NAMES[2], "resumed")] == [1]


def test_a_run_that_diverges_leaves_the_others_alone(lora, recipe, tmp_path):
    done = lora("sweep", recipe(SHORT), "--grid", "training.learning_rate=1e30,0.02", "--json")

    assert [(run["state"], run["exit_code"]) for run in done.json["runs"]] == [("finished", 0), ("diverged", 6)]


def test_where_every_run_diverges_so_does_the_sweep(lora, recipe):
    lora("sweep", recipe(SHORT), "--grid", "training.learning_rate=1e30,1e31", code=6)


def test_mistakes_of_all_runs_are_told_at_once_and_nothing_is_made(lora, recipe, tmp_path):
    file = recipe(SHORT)

    done = lora("sweep", file, "--grid", "lora.r=2,zero", "--grid", "training.learning_rat=1,2", code=2)

    assert done.err.count("error:") == 3
    assert "--> --grid lora.r=zero" in done.err
    assert "rename it to `training.learning_rate`" in done.err
    assert not (tmp_path / "out-sweep").exists()


def test_what_is_wrong_with_the_last_run_costs_no_time_of_the_first(lora, recipe, tmp_path):
    done = lora("sweep", recipe(SHORT), "--grid", "lora.targets=qv,[nothing]", code=4)

    assert "nothing" in done.err
    assert not (tmp_path / "out-sweep").exists()


@pytest.mark.parametrize("arguments", [[], ["--resume", "--out", "elsewhere"]])
def test_another_folder_is_never_mixed_with_a_sweep(arguments, lora, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("out-sweep", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()

    done = lora("sweep", recipe(SHORT), *GRID, *arguments, code=5)

    assert "--resume" in done.err or "no sweep to resume" in done.err
    assert [file.name for file in (tmp_path / "out-sweep").iterdir()] == ["mine"]


def test_a_sweep_without_values_says_how_to_give_them(lora, recipe):
    assert "write `--grid lora.r=4,8,16`" in lora("sweep", recipe(SHORT), code=2).err
