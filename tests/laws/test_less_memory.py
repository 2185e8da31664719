"""Out of memory: the step is taken again in smaller forwards, and the run ends as if they had been small from the start."""

import json

import pytest
import torch
from faults import with_room_for
from running import adapter_bytes, events, lora_workers
from same_run import WHOLE, assert_same_run

from lora_cli.objectives.table import OBJECTIVES
from lora_cli.train.layout import Layout, halved

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
WIDE = {"training.global_batch_size": 8, "training.micro_batch_size": 8, "data.packing": False}


@pytest.mark.parametrize(("room", "fits"), [(4, 4), (3, 2), (1, 1)])
def test_a_step_that_does_not_fit_is_taken_again_in_halves(room, fits, lora, recipe, tmp_path, monkeypatch):
    lora("train", recipe(WIDE | {"training.micro_batch_size": fits}), "--out", tmp_path / "small")
    monkeypatch.setitem(OBJECTIVES, "sft", with_room_for(room, OBJECTIVES["sft"]))

    done = lora("train", recipe(WIDE))

    found = events(tmp_path / "out", "out_of_memory")
    assert [event["step"] for event in found] == [1] * len(found)
    assert found[-1]["micro_batch_size"] == fits
    assert "warning: out of memory in step 1; taken again, and all from here on, with" in done.err
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "small")


def test_a_resumed_run_begins_with_the_smaller_forwards(lora, recipe, tmp_path, monkeypatch):
    settings = WIDE | {"training.save_steps": 2, "training.max_time": "1s"}
    monkeypatch.setitem(OBJECTIVES, "sft", with_room_for(2, OBJECTIVES["sft"]))
    lora("train", recipe(settings | {"training.max_steps": 100_000}))

    lora("train", recipe(settings | {"training.max_steps": 100_000}), "--resume")

    assert [event["micro_batch_size"] for event in events(tmp_path / "out", "started")] == [8, 2]
    assert len(events(tmp_path / "out", "out_of_memory")) == 2  # 4, then 2


def test_packed_rows_get_shorter_down_to_the_longest_example(lora, recipe, tmp_path, monkeypatch):
    settings = {"data.packing": True, "data.max_length": 128, "training.micro_batch_size": 1}
    lengths = []

    def room_for_40_tokens(model, batch):
        if batch["input_ids"].shape[1] > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        lengths.append(batch["input_ids"].shape[1])
        return plain(model, batch)

    plain = OBJECTIVES["sft"]
    monkeypatch.setitem(OBJECTIVES, "sft", room_for_40_tokens)
    lora("train", recipe(settings | {"training.global_batch_size": 8}))

    assert [event["row_length"] for event in events(tmp_path / "out", "out_of_memory")] == [64, 32]
    assert max(lengths) <= 32


def short_of_memory(rank: int, rows: int) -> None:
    """On rank 1 no forward of a step has room for more than so many rows, from the third one on."""
    plain, steps = OBJECTIVES["sft"], []

    def objective(model, batch):
        steps.append(model.training)
        if sum(steps) >= 3:
            return with_room_for(rows, plain)(model, batch)
        return plain(model, batch)

    if rank == 1:
        OBJECTIVES["sft"] = objective


@pytest.mark.parametrize("save_steps", [2, None], ids=["from a checkpoint", "from the beginning"])
def test_where_others_wait_in_a_forward_all_leave_and_start_again(save_steps, lora, recipe, tmp_path):
    settings = WHOLE | {"training.micro_batch_size": 4, "data.packing": False, "training.save_steps": save_steps}
    lora("train", recipe(settings), "--out", tmp_path / "whole")

    left = lora_workers(2, "train", recipe(settings), code=7, before=lambda rank: short_of_memory(rank, 2), **FSDP2)
    for done in left:
        assert "error: out of memory on worker 1 in step 3, while the others wait for it\n" in done.err
    said = {"LORA_SHORTAGE": json.dumps({"step": 3, "rank": 1, "micro_batch_size": 2, "row_length": None})}
    again = lora_workers(
        2, "train", recipe(settings), "--resume", before=lambda rank: short_of_memory(rank, 2), **FSDP2 | said
    )

    assert "out of memory in step 3; taken again, and all from here on, with 2 rows a forward" in again[0].err
    assert [event["step"] for event in events(tmp_path / "out", "started")] == [0, save_steps or 0]
    [shortage] = events(tmp_path / "out", "out_of_memory")
    assert (shortage["step"], shortage["rank"], shortage["micro_batch_size"]) == (3, 1, 2)
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def test_a_single_row_that_does_not_fit_a_shard_is_named_by_its_worker(recipe):
    settings = WIDE | {"training.micro_batch_size": 1}

    waits, short = lora_workers(
        2, "train", recipe(settings), code=None, before=lambda rank: short_of_memory(rank, 0), **FSDP2
    )

    assert (waits.code, short.code) == (8, 7)
    assert "error: out of memory on a single row of " in short.err
    assert "lost the others" in waits.err


def test_a_single_row_that_does_not_fit_is_exit_7_naming_it_and_what_fits(lora, recipe, tmp_path, monkeypatch):
    def room_for_13_tokens(model, batch):
        if batch["input_ids"].numel() > 13:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(model, batch)

    plain = OBJECTIVES["sft"]
    monkeypatch.setitem(OBJECTIVES, "sft", room_for_13_tokens)

    done = lora("train", recipe(WIDE), code=7)

    error = done.err[done.err.index("error:") :]
    assert error.startswith("error: out of memory on a single row of ")
    assert "tokens have fitted\n  --> train.jsonl:" in error
    assert "`data.max_length: " in error
    assert not events(tmp_path / "out", "step")


def test_an_error_that_is_no_shortage_is_not_tried_again(lora, recipe, monkeypatch):
    def fail(model, batch):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setitem(OBJECTIVES, "sft", fail)

    assert "a bug in lora: RuntimeError: mat1 and mat2" in lora("train", recipe(), code=1).err


def test_trying_the_largest_forward_first_changes_nothing(lora, recipe, tmp_path, monkeypatch):
    settings = {"lora.dropout": 0.1, "training.micro_batch_size": 2, "data.eval": "25%"}
    lora("train", recipe(settings), "--out", tmp_path / "plain")
    seen = []
    monkeypatch.setattr("lora_cli.train.auto.rehearses", lambda device: True)
    counted = OBJECTIVES["sft"]
    monkeypatch.setitem(
        OBJECTIVES, "sft", lambda model, batch: (seen.append(batch["input_ids"].numel()), counted(model, batch))[1]
    )

    lora("train", recipe(settings), "--out", tmp_path / "tried")

    assert adapter_bytes(tmp_path / "tried") == adapter_bytes(tmp_path / "plain")
    assert seen[0] == max(seen)


def test_halving_ends_at_one_example():
    from lora_cli.data.types import Example, RowId

    rows = [Example([1] * length, [1.0] * length, RowId("a", length)) for length in (30, 50)]
    layouts = [Layout(4, 128)]
    while found := halved(layouts[-1], rows):
        layouts.append(found)

    assert layouts == [Layout(4, 128), Layout(2, 128), Layout(1, 128), Layout(1, 64), Layout(1, 50)]
