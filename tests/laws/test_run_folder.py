"""What a run leaves behind, how it stops, and what it never touches (contract, parts 3 and 4)."""

import json
import os

import pytest
import torch
from running import adapter_bytes, events, hashes, weights
from safetensors.torch import load_file

from lora_cli.recipe.reader import read_recipe
from lora_cli.runs.folder import RunFolder
from lora_cli.runs.train import execute, finish, prepare

STEP_KEYS = {"step", "loss", "lr", "grad_norm", "tokens", "seconds"}


def test_events_carry_the_contracts_keys(lora, recipe, tmp_path):
    lora("train", recipe({"data.eval": "25%", "training.eval_steps": 2, "training.sample_prompts": ["what"]}))

    found = events(tmp_path / "out")

    kinds = {"started", "step", "memory", "evaluated", "sampled", "saved", "finished"}
    assert {event["event"] for event in found} == kinds
    assert [event["step"] for event in found if event["event"] == "step"] == [1, 2, 3, 4]
    assert all(set(event) >= STEP_KEYS for event in found if event["event"] == "step")
    assert found[0]["event"] == "started"
    assert found[-1]["event"] == "finished"
    tokens = [event["tokens"] for event in events(tmp_path / "out", "step")]
    assert tokens == sorted(tokens)
    assert tokens[0] > 0


def test_the_run_folder_holds_what_the_contract_says(lora, recipe, tmp_path, tiny_llama):
    lora("train", recipe())

    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "recipe.yaml", "run.json", "events.jsonl", "report.html", "README.md", "checkpoints", "run.lock", "proof_rows.json",
    }  # fmt: skip
    assert not [name for name in names if name.startswith(".tmp-")]
    record = json.loads((out / "run.json").read_text())
    assert record["seed"] == 42
    assert record["base"]["name"] == str(tiny_llama)
    assert set(record["base"]["fingerprint"]) == {"layout", "samples"}
    assert record["machine"]["versions"]["torch"]
    assert len(record["data"]["train"]["fingerprint"]) == 64


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_modes_follow_the_umask(umask, lora, recipe, tmp_path):
    before = os.umask(umask)
    try:
        lora("train", recipe({"training.max_steps": 2, "training.save_steps": 1}))
        lora("merge", "--adapter", tmp_path / "out")
    finally:
        os.umask(before)

    modes = {path: path.stat().st_mode & 0o777 for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]}
    assert {path.name for path in modes} >= {
        "adapter_model.safetensors",
        "MANIFEST.json",
        "merged",
        "model.safetensors",
    }
    assert {path: mode for path, mode in modes.items() if mode != (0o777 if path.is_dir() else 0o666) & ~umask} == {}


def test_no_file_of_a_run_is_a_pickle(lora, recipe, tmp_path):
    lora("train", recipe({"training.optimizer": "adamw_8bit"}))

    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {
        ".json",
        ".jsonl",
        ".safetensors",
        ".yaml",
        ".jinja",
        ".lock",
        ".md",
        ".html",
    }
    assert not [file for file in files if file.read_bytes()[:1] == b"\x80" or file.read_bytes()[:2] == b"PK"]


def test_the_resolved_recipe_trains_the_same_adapter(lora, recipe, tmp_path):
    lora("train", recipe({"lora.dropout": 0.1}))

    lora("train", tmp_path / "out/recipe.yaml", "--out", tmp_path / "again")

    assert adapter_bytes(tmp_path / "again") == adapter_bytes(tmp_path / "out")


def test_the_final_adapter_is_the_last_checkpoints(lora, recipe, tmp_path):
    lora("train", recipe({"training.save_steps": 3, "training.max_steps": 5}))

    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "out/checkpoints/step-0000005")
    assert not weights(tmp_path / "out")["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"].isnan().any()


def test_the_base_is_never_touched(lora, recipe, tiny_llama):
    before = hashes(tiny_llama)

    lora("train", recipe())

    assert hashes(tiny_llama) == before


def test_a_base_that_changed_in_training_is_an_error_and_no_adapter_is_written(recipe, tmp_path):
    folder = RunFolder(tmp_path / "out")
    with folder.held(resume=False, overwrite=False) as hold:
        run = prepare(read_recipe(recipe()), folder)
        hold.begin()
        *_, finished = execute(run)
        with torch.no_grad():
            next(p for p in run.model.parameters() if not p.requires_grad).add_(1e-3)

        with pytest.raises(RuntimeError, match="the frozen base has changed during training"):
            finish(run, finished)

    assert not (folder.path / "adapter_model.safetensors").exists()


def test_a_folder_that_is_not_empty_is_refused_with_the_three_ways_out(lora, recipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")

    done = lora("train", recipe(), code=5)

    assert "the output folder is not empty" in done.err
    assert all(way in done.err for way in ("--resume", "--out", "--overwrite"))
    assert hashes(tmp_path / "out").keys() == {"notes.txt"}


def test_an_output_that_is_a_file_is_refused(lora, recipe, tmp_path):
    (tmp_path / "out").write_text("mine")

    assert "the output is a file" in lora("train", recipe(), code=5).err
    assert (tmp_path / "out").read_text() == "mine"


def test_overwrite_moves_the_old_run_aside_whole(lora, recipe, tmp_path):
    lora("train", recipe())
    first = hashes(tmp_path / "out")

    for number in (1, 2):
        done = lora("train", recipe({"training.seed": number}), "--overwrite")
        assert f"the old run was moved to {tmp_path / f'out.old-{number}'}" in done.err

    assert hashes(tmp_path / "out.old-1") == first
    assert hashes(tmp_path / "out.old-2") != hashes(tmp_path / "out")


def test_a_run_that_cannot_start_leaves_an_old_one_where_it_is(lora, recipe, tmp_path):
    lora("train", recipe())
    before = hashes(tmp_path / "out")

    lora("train", recipe({"model.base": "./nowhere"}), "--overwrite", code=4)

    assert hashes(tmp_path / "out") == before
    assert not list(tmp_path.glob("out.old-*"))


def test_a_folder_another_run_writes_to_is_refused(lora, recipe, tmp_path):
    from lora_cli.runs.folder import RunFolder

    with RunFolder(tmp_path / "out").held(resume=False, overwrite=False):
        done = lora("train", recipe(), "--overwrite", code=5)

    assert f"another run is writing here: process {os.getpid()} on " in done.err


def test_max_time_stops_saves_and_ends_well(lora, recipe, tmp_path):
    lora("train", recipe({"training.max_steps": 100_000, "training.max_time": "1s"}))

    finished = events(tmp_path / "out", "finished")[0]
    assert finished["reason"] == "max_time"
    assert 1.0 <= finished["seconds"] < 10
    assert (tmp_path / f"out/checkpoints/step-{finished['step']:07d}/MANIFEST.json").is_file()
    assert any(tensor.any() for name, tensor in weights(tmp_path / "out").items() if "lora_B" in name)


def test_early_stopping_stops_when_the_held_out_loss_rises(lora, recipe, tmp_path):
    settings = {
        "training.max_steps": 200,
        "training.learning_rate": 0.5,
        "training.eval_steps": 1,
        "training.early_stopping_patience": 2,
        "data.eval": "25%",
    }
    lora("train", recipe(settings))

    assert events(tmp_path / "out", "finished")[0]["reason"] == "early stopping"
    evaluations = events(tmp_path / "out", "evaluated")
    assert [event["best"] for event in evaluations[-2:]] == [False, False]
    assert len(evaluations) < 100


def test_a_diverged_run_is_exit_6_and_its_last_checkpoint_is_untouched(lora, recipe, tmp_path):
    done = lora("train", recipe({"training.learning_rate": 1e30, "training.save_steps": 1}), code=6)

    assert (
        "error: 3 steps in a row could not be applied: step 4 has a loss of nan and a gradient norm of nan" in done.err
    )
    assert "train.jsonl:" in done.err
    assert "Traceback" not in done.err
    out = tmp_path / "out"
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-0000001"]
    assert all(
        tensor.isfinite().all()
        for tensor in load_file(out / "checkpoints/step-0000001/adapter_model.safetensors").values()
    )
    assert not (out / "adapter_model.safetensors").exists()
    assert [event["step"] for event in events(out, "skipped")] == [2, 3, 4]


def test_a_diverged_run_can_not_overwrite_what_an_earlier_one_left(lora, recipe, tmp_path):
    lora("train", recipe())
    before = adapter_bytes(tmp_path / "out")

    lora("train", recipe({"training.learning_rate": 1e30}), "--overwrite", code=6)

    assert adapter_bytes(tmp_path / "out.old-1") == before


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_the_curve_falls(optimizer, lora, recipe, tmp_path):
    lora("train", recipe({"training.max_steps": 12, "data.eval": "25%", "training.optimizer": optimizer}))

    losses = [event["loss"] for event in events(tmp_path / "out", "step")]
    held_out = [event["loss"] for event in events(tmp_path / "out", "evaluated")]
    assert losses[-1] < losses[0] - 0.2
    assert held_out[-1] < held_out[0]
    assert torch.tensor(losses).isfinite().all()


def test_tensorboard_gets_the_same_curve(lora, recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lora("train", recipe({"training.trackers": ["tensorboard"], "data.eval": "25%"}))

    read = EventAccumulator(str(tmp_path / "out/tensorboard"))
    read.Reload()
    curve = [scalar.value for scalar in read.Scalars("train/loss")]
    assert curve == pytest.approx([event["loss"] for event in events(tmp_path / "out", "step")], rel=1e-6)
    assert len(read.Scalars("eval/loss")) == 2
