"""Runs that must be the same, through the command line: however a step is split, wherever and however often it is run."""

import pytest
from running import adapter_bytes, events, lora_process
from same_run import FIRST_STEP, WHOLE, assert_same_gradients, assert_same_run


@pytest.fixture
def whole(lora, recipe, tmp_path):
    """8 × 1: one micro-batch of eight rows a step."""
    lora("train", recipe(WHOLE), "--out", tmp_path / "whole")
    return tmp_path / "whole"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_eight_rows_are_eight_rows_however_they_are_cut(size, whole, lora, recipe, tmp_path):
    lora("train", recipe(WHOLE | {"training.micro_batch_size": size}), "--out", tmp_path / "cut")

    assert_same_run(tmp_path / "cut", whole)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_gradients_of_eight_rows_are_the_same_however_they_are_cut(size, lora, recipe, tmp_path):
    lora("train", recipe(WHOLE | FIRST_STEP), "--out", tmp_path / "whole")

    lora("train", recipe(WHOLE | FIRST_STEP | {"training.micro_batch_size": size}), "--out", tmp_path / "cut")

    assert_same_gradients(tmp_path / "cut", tmp_path / "whole")


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
