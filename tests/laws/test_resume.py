"""Stop and resume is straight through, byte for byte on the CPU."""

import itertools
import shutil

import pytest
from running import adapter_bytes, events, hashes

from lora_cli.train import loop

# 12 rows, 4 held out: a step of 5 rows crosses the end of an epoch in the middle
SETTINGS = {
    "training.global_batch_size": 5,
    "training.max_steps": 6,
    "training.save_steps": 2,
    "training.keep_checkpoints": 9,
    "training.eval_steps": 2,
    "training.lr_scheduler": "cosine",
    "training.warmup_ratio": 0.3,
    "lora.dropout": 0.1,
    "data.eval": "30%",
}


def resumed_after(step: int, folder, recipe, lora, *arguments) -> None:
    """Take a finished run back to a checkpoint, as if it had been killed behind it, and resume it."""
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()
    lora("train", recipe, "--resume", *arguments)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"lora.init": "pissa"},
        {"lora.use_dora": True, "lora.use_rslora": True},
        {"training.optimizer": "adamw_8bit"},
        {"training.gradient_checkpointing": True},
    ],
    ids=["plain", "pissa", "dora", "8bit", "recomputed"],
)
def test_a_run_resumed_in_the_middle_ends_with_the_same_bytes(changed, lora, recipe, tmp_path):
    file = recipe(SETTINGS | changed)
    lora("train", file)
    straight, curve = adapter_bytes(tmp_path / "out"), losses(tmp_path / "out")

    resumed_after(2, tmp_path / "out", file, lora)

    assert adapter_bytes(tmp_path / "out") == straight
    assert losses(tmp_path / "out") == curve
    assert [e["step"] for e in events(tmp_path / "out", "started")] == [0, 2]


def test_a_run_stopped_by_max_time_goes_on_to_the_same_bytes(lora, recipe, tmp_path, monkeypatch):
    lora("train", recipe(SETTINGS), "--out", tmp_path / "straight")

    with monkeypatch.context() as patched:
        ticks = itertools.count()
        patched.setattr(loop._Clock, "seconds", property(lambda clock: float(next(ticks))))
        lora("train", recipe(SETTINGS), "--set", "training.max_time=3s")
    stopped = events(tmp_path / "out", "finished")[-1]
    lora("train", recipe(SETTINGS), "--resume")

    assert stopped["reason"] == "max_time"
    assert 0 < stopped["step"] < 6
    assert events(tmp_path / "out", "finished")[-1]["reason"] == "all steps"
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "straight")


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_continues(lora, recipe, tmp_path):
    lora("train", recipe(SETTINGS))
    straight = adapter_bytes(tmp_path / "out")
    newest = tmp_path / "out/checkpoints/step-0000006/optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])

    done = lora("train", recipe(SETTINGS), "--resume")

    fault = "step-0000006 is damaged (optimizer.safetensors is missing or cut)"
    assert f"{fault}: kept as step-0000006.damaged-1, going back to the one before" in done.err
    assert (tmp_path / "out/checkpoints/step-0000006.damaged-1/state.json").is_file()
    assert "continuing after step 4" in done.err
    assert adapter_bytes(tmp_path / "out") == straight


def test_a_finished_run_resumed_stays_as_it_is(lora, recipe, tmp_path):
    lora("train", recipe(SETTINGS))
    before = hashes(tmp_path / "out")

    done = lora("train", recipe(SETTINGS), "--resume")

    assert "the run has finished already, at step 6, and nothing has changed: nothing to do" in done.err
    assert hashes(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora.r", 8),
        ("lora.dropout", 0.2),
        ("training.learning_rate", 0.1),
        ("training.seed", 7),
        ("lora.init", "pissa"),
    ],
)
def test_a_changed_recipe_is_refused_by_name_and_changes_no_file(key, value, lora, recipe, tmp_path):
    lora("train", recipe(SETTINGS))
    before = hashes(tmp_path / "out")

    done = lora("train", recipe(SETTINGS | {key: value}), "--resume", code=2)

    assert f"`{key}` has changed since the run was started" in done.err
    assert hashes(tmp_path / "out") == before


def test_other_rows_are_refused(lora, recipe, tmp_path):
    lora("train", recipe(SETTINGS))
    file = recipe(SETTINGS)
    with (tmp_path / "train.jsonl").open("a") as rows:
        rows.write('{"prompt": "what", "completion": " the mat"}\n')

    done = lora("train", file, "--resume", code=3)

    assert "`data.train` (the training rows, as the tokenizer renders them,) has changed" in done.err


def test_what_changes_no_training_may_change(lora, recipe, tmp_path):
    lora("train", recipe(SETTINGS))
    straight = adapter_bytes(tmp_path / "out")

    free = ("training.save_steps=3", "training.log_steps=7", "training.keep_checkpoints=3")
    resumed_after(2, tmp_path / "out", recipe(SETTINGS), lora, *(x for pair in free for x in ("--set", pair)))

    assert adapter_bytes(tmp_path / "out") == straight


def losses(out) -> list[float]:
    return [event["loss"] for event in events(out, "step")]
