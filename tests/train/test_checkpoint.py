"""A checkpoint is whole or not there; damaged ones are named and passed over."""

import json
import logging
import os

import pytest
import torch
from layers import PATH, inputs
from running import hashes
from saving import SETTINGS, Run

from lora_cli.durable import write_synced
from lora_cli.errors import ModelError, StorageError
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.init import INITS
from lora_cli.lora.inject import lora_layers
from lora_cli.lora.peft_format import load_adapter
from lora_cli.train.checkpoint import (
    MANIFEST,
    OPTIMIZER,
    STATE,
    newest_checkpoint,
    restore,
    save_checkpoint,
    set_damaged_aside,
)
from lora_cli.train.optim import optimizer_state
from lora_cli.train.progress import Progress


@pytest.fixture
def saved(tmp_path):
    """A run with checkpoints of steps 1, 2 and 3."""
    run = Run()
    for _ in range(3):
        run.train(1)
        run.save(tmp_path)
    return tmp_path


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("variant", ["plain", "rslora", "dora+rslora", "patterns"])
def test_restored_it_goes_on_bit_for_bit(variant, init, tmp_path):
    straight = Run(variant, init)
    straight.train(3)
    straight.save(tmp_path)
    straight.train(3)

    resumed = Run(variant, init)
    checkpoint = newest_checkpoint(tmp_path)
    restore(checkpoint, resumed.model, resumed.optimizer, resumed.parameters)
    resumed.step = checkpoint.progress.step
    resumed.train(3)

    assert all(torch.equal(resumed.parameters[name], straight.parameters[name]) for name in straight.parameters)
    assert torch.equal(resumed.model(inputs()), straight.model(inputs()))


def test_progress_and_settings_come_back_as_they_went(saved):
    checkpoint = newest_checkpoint(saved)

    assert checkpoint.progress == Progress(3, 30, 1.5, 0.25, 1)
    assert checkpoint.settings == SETTINGS


def test_a_run_that_was_never_evaluated_has_strict_json_all_the_same(tmp_path):
    run = Run()
    run.train(1)
    folder = save_checkpoint(
        tmp_path,
        Progress(step=1),
        Adapter.of(run.model, run.config),
        optimizer_state(run.optimizer, run.parameters),
        settings={},
        transposed=False,
        keep=2,
    )

    json.loads((folder / STATE).read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert newest_checkpoint(tmp_path).progress == Progress(step=1)


def test_a_checkpoint_is_an_adapter_of_its_own(saved):
    load_adapter(saved / "step-0000003").check_alive()


def test_it_holds_exactly_these_files_and_no_pickle(saved):
    assert names(saved / "step-0000003") == sorted(
        ["adapter_config.json", "adapter_model.safetensors", OPTIMIZER, STATE, MANIFEST]
    )
    assert not any(
        file.read_bytes()[:1] == b"\x80" or file.read_bytes()[:2] == b"PK"
        for file in saved.rglob("*.*")
        if file.is_file()
    )


def test_the_same_state_is_saved_as_the_same_bytes(tmp_path):
    run = Run()
    run.train(2)

    first, second = run.save(tmp_path / "a"), run.save(tmp_path / "b")

    assert {f: (first / f).read_bytes() for f in names(first)} == {f: (second / f).read_bytes() for f in names(second)}


def truncate(folder):
    file = folder / OPTIMIZER
    file.write_bytes(file.read_bytes()[:-1])


def change_a_byte(folder):
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def without_the_adapter(folder):
    file = folder / MANIFEST
    listed = json.loads(file.read_text())
    del listed["adapter_model.safetensors"]
    file.write_text(json.dumps(listed))


DAMAGE = {
    "truncated": (truncate, f"{OPTIMIZER} is missing or cut"),
    "changed": (change_a_byte, "adapter_model.safetensors has changed"),
    "a file gone": (lambda folder: (folder / STATE).unlink(), f"{STATE} is missing or cut"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), f"no readable {MANIFEST}"),
    "manifest cut": (lambda folder: (folder / MANIFEST).write_text('{"a'), f"no readable {MANIFEST}"),
    "manifest of another shape": (lambda folder: (folder / MANIFEST).write_text('{"a": 1}'), f"no readable {MANIFEST}"),
    "manifest a list": (lambda folder: (folder / MANIFEST).write_text("[1]"), f"no readable {MANIFEST}"),
    "manifest without end": (lambda folder: (folder / MANIFEST).write_text("[" * 99_999), f"no readable {MANIFEST}"),
    "manifest without the adapter": (without_the_adapter, f"no readable {MANIFEST}"),
    "manifest empty": (lambda folder: (folder / MANIFEST).write_text("{}"), f"no readable {MANIFEST}"),
}


def test_every_file_and_name_is_on_the_disk_before_a_step_counts_as_saved(tmp_path, monkeypatch):
    run, folder, real = Run(), tmp_path / "step-0000001", os.fsync
    before_the_name, behind_it = set(), set()

    def seen(descriptor: int) -> None:
        real(descriptor)
        (behind_it if folder.exists() else before_the_name).add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", seen)
    run.train(1)
    run.save(tmp_path)

    assert {path.stat().st_ino for path in (folder, *folder.iterdir())} <= before_the_name
    assert tmp_path.stat().st_ino in behind_it


@pytest.mark.parametrize("name", [OPTIMIZER, "adapter_model.safetensors", STATE])
def test_what_the_disk_gives_back_otherwise_is_not_saved_and_nothing_has_changed(name, saved, monkeypatch):
    def with_a_bit_lost(file, content):
        write_synced(file, content[:-1] + bytes([content[-1] ^ 1]) if file.name == name else content)

    run, before = Run(), hashes(saved)
    monkeypatch.setattr("lora_cli.train.checkpoint.write_synced", with_a_bit_lost)
    run.train(4)

    with pytest.raises(StorageError, match="does not read back the same"):
        run.save(saved, keep=1)

    assert hashes(saved) == before


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_is_named_and_passed_over(damage, saved, caplog):
    harm, fault = DAMAGE[damage]
    harm(saved / "step-0000003")

    with caplog.at_level(logging.WARNING, "lora_cli"):
        set_damaged_aside(saved)

    assert newest_checkpoint(saved).folder.name == "step-0000002"
    assert names(saved) == ["step-0000001", "step-0000002", "step-0000003.damaged-1"]
    assert [r.getMessage() for r in caplog.records] == [
        f"{saved / 'step-0000003'} is damaged ({fault}): kept as step-0000003.damaged-1, going back to the one before"
    ]


def test_where_all_are_damaged_there_is_none(saved, caplog):
    for folder in saved.iterdir():
        truncate(folder)

    assert newest_checkpoint(saved) is None
    set_damaged_aside(saved)
    assert len(caplog.records) == 3


def test_no_folder_and_an_empty_one_have_none(tmp_path):
    assert newest_checkpoint(tmp_path / "nothing") is None
    assert newest_checkpoint(tmp_path) is None


def test_drafts_and_strangers_are_no_checkpoints(saved):
    (saved / ".tmp-step-0000009-1").mkdir()
    (saved / "step-best").mkdir()
    (saved / "notes").mkdir()

    assert newest_checkpoint(saved).folder.name == "step-0000003"


def test_rotation_keeps_the_newest_by_the_number_of_the_step_whatever_the_clock_says(tmp_path):
    run = Run()
    for step in (2, 9, 10, 11):
        run.train(step - run.step)
        folder = run.save(tmp_path, keep=9)
        os.utime(folder, (10_000 - step, 10_000 - step))

    run.train(1)
    run.save(tmp_path, keep=3)

    assert names(tmp_path) == ["step-0000010", "step-0000011", "step-0000012"]


def test_steps_above_seven_digits_are_still_newer(tmp_path):
    run = Run()
    run.train(1)
    for step in (9_999_999, 10_000_000):
        run.step = step
        run.save(tmp_path)

    assert newest_checkpoint(tmp_path).progress.step == 10_000_000


def test_a_step_that_is_saved_already_stays_and_a_damaged_one_is_written_anew(saved):
    run = Run()
    run.train(3)
    before = hashes(saved)

    run.save(saved)
    assert hashes(saved) == before

    truncate(saved / "step-0000003")
    run.save(saved)
    assert names(saved) == ["step-0000001", "step-0000002", "step-0000003", "step-0000003.damaged-1"]
    assert newest_checkpoint(saved).progress.step == 3


def test_other_targets_than_the_checkpoints_are_refused(saved):
    run = Run()
    other = torch.nn.ModuleDict({"other": run.model.proj})

    with pytest.raises(ModelError, match="the checkpoint's layers are not those of this recipe's targets"):
        restore(newest_checkpoint(saved), other, run.optimizer, run.parameters)


def test_the_start_that_is_taken_off_comes_back_with_the_factors(tmp_path):
    run = Run(init="pissa")
    start = lora_layers(run.model)[PATH].start_A.clone()
    run.train(2)
    run.save(tmp_path)

    again = Run(init="default")
    restore(newest_checkpoint(tmp_path), again.model, again.optimizer, again.parameters)

    assert torch.equal(lora_layers(again.model)[PATH].start_A, start)
    assert torch.equal(again.model(inputs()), run.model(inputs()))
