"""Runs that must be the same, through the command line: however a step is split, on however many processes.

The measure is the contract's: largest difference ÷ largest entry, in float32.
"""

import pytest
from layers import relative_difference
from running import adapter_bytes, events, lora_process, weights
from safetensors.torch import load_file
from torch import Tensor

AGREE = 1e-6
# Adam divides by the root of the second moment: where a gradient is nearly nothing, it magnifies rounding
AGREE_AFTER_ADAM = 1e-5
WHOLE = {"training.global_batch_size": 8, "training.max_steps": 5, "training.micro_batch_size": 8, "data.eval": "20%"}


def assert_same_run(found, expected) -> None:
    """The same curve and the same adapter to rounding."""
    pairs = list(zip(events(found, "step"), events(expected, "step"), strict=True))
    assert len(pairs) == 5
    for mine, theirs in pairs:
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=AGREE)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=AGREE)
        assert (mine["step"], mine["lr"], mine["tokens"]) == (theirs["step"], theirs["lr"], theirs["tokens"])
    for mine, theirs in zip(events(found, "evaluated"), events(expected, "evaluated"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=AGREE)
    mine, theirs = weights(found), weights(expected)
    assert max(relative_difference(mine[name], theirs[name]) for name in theirs) <= AGREE_AFTER_ADAM


def first_gradients(out) -> dict[str, Tensor]:
    """What the optimizer saw at the first step: its first moment then is a tenth of the gradient."""
    tensors = load_file(out / "checkpoints/step-0000001/optimizer.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.endswith("/exp_avg")}


def assert_same_gradients(found, expected) -> None:
    mine, theirs = first_gradients(found), first_gradients(expected)
    assert len(mine) == len(theirs) == 28
    for name in theirs:
        assert theirs[name].any()
        assert relative_difference(mine[name], theirs[name]) <= AGREE


@pytest.fixture
def whole(lora, recipe, tmp_path):
    """8 × 1: one micro-batch of eight rows a step."""
    lora("train", recipe(WHOLE), "--out", tmp_path / "whole")
    return tmp_path / "whole"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_eight_rows_are_eight_rows_however_they_are_cut(size, whole, lora, recipe, tmp_path):
    lora("train", recipe(WHOLE | {"training.micro_batch_size": size}), "--out", tmp_path / "cut")

    assert_same_run(tmp_path / "cut", whole)


# OLoRA starts with a B that is not zero, so that A has a gradient in the first step
FIRST_STEP = {"lora.init": "olora", "training.save_steps": 1, "training.keep_checkpoints": 9}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_gradients_of_eight_rows_are_the_same_however_they_are_cut(size, lora, recipe, tmp_path):
    lora("train", recipe(WHOLE | FIRST_STEP), "--out", tmp_path / "whole")

    lora("train", recipe(WHOLE | FIRST_STEP | {"training.micro_batch_size": size}), "--out", tmp_path / "cut")

    assert_same_gradients(tmp_path / "cut", tmp_path / "whole")


def test_two_processes_are_one(lora, recipe, tmp_path):
    """With 7 rows a step, one process has a row less than the other."""
    settings = WHOLE | FIRST_STEP | {"training.global_batch_size": 7, "training.micro_batch_size": 2}
    lora("train", recipe(settings), "--out", tmp_path / "one")

    lora_process("train", recipe(settings), "--out", tmp_path / "two", "--processes", 2)

    assert events(tmp_path / "two", "started")[0]["processes"] == 2
    assert_same_gradients(tmp_path / "two", tmp_path / "one")
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_the_same_recipe_twice_is_the_same_bytes(init, lora, recipe, tmp_path):
    settings = WHOLE | {"lora.dropout": 0.1, "lora.init": init}
    for name in ("a", "b"):
        lora("train", recipe(settings), "--out", tmp_path / name)

    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b")
    assert [e["loss"] for e in events(tmp_path / "a", "step")] == [e["loss"] for e in events(tmp_path / "b", "step")]


def test_a_process_of_its_own_gives_the_same_bytes(lora, recipe, tmp_path):
    settings = WHOLE | {"lora.dropout": 0.1}
    lora("train", recipe(settings), "--out", tmp_path / "here")

    lora_process("train", recipe(settings), "--out", tmp_path / "there")

    assert adapter_bytes(tmp_path / "here") == adapter_bytes(tmp_path / "there")


def test_another_seed_is_another_run(lora, recipe, tmp_path):
    for seed in (1, 2):
        lora("train", recipe(WHOLE | {"training.seed": seed}), "--out", tmp_path / str(seed))

    assert adapter_bytes(tmp_path / "1") != adapter_bytes(tmp_path / "2")


def test_recomputing_activations_changes_nothing(whole, lora, recipe, tmp_path):
    lora("train", recipe(WHOLE | {"training.gradient_checkpointing": True}), "--out", tmp_path / "recomputed")

    assert_same_run(tmp_path / "recomputed", whole)


def test_evaluating_and_saving_on_the_way_changes_nothing(whole, lora, recipe, tmp_path):
    on_the_way = {"training.eval_steps": 1, "training.save_steps": 1, "training.sample_prompts": ["what"]}
    lora("train", recipe(WHOLE | on_the_way), "--out", tmp_path / "watched")

    assert adapter_bytes(tmp_path / "watched") == adapter_bytes(whole)
    assert len(events(tmp_path / "watched", "sampled")) == 6
