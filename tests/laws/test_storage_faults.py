"""Whatever the disk does during a save, what is there after it is whole, and the next start goes on as if nothing had been."""

import errno
import resource

import pytest
from faults import forked
from running import adapter_bytes, hashes
from saving import Run
from storage_faults import DAMAGE, FAULTS, Damage, Save, flip, step, unreadable
from tracing import AVAILABLE, LOST, Traced, stand_still

from lora_cli.train.checkpoint import MANIFEST, OPTIMIZER

SETTINGS = {"training.max_steps": 3, "training.save_steps": 1}  # of the runs through the command

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="system calls are traced on Linux on x86-64")


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    return Save(tmp_path_factory.mktemp("save"))


@pytest.mark.parametrize("fault", [name for name in FAULTS if FAULTS[name] != LOST])
def test_every_call_of_a_save_may_fail_or_be_its_last(fault, save):
    for number in range(1, len(save.calls) + 1):
        save.trial(number, FAULTS[fault])


def test_a_write_that_is_silently_lost_is_found_before_the_step_counts_as_saved(save):
    for number in save.writes:
        save.trial(number, LOST)


def test_what_is_renamed_has_been_forced_to_disk_and_then_the_name(save):
    """What a loss of power leaves is not up to the order of the calls then."""
    renamed = next(number for number, call in enumerate(save.calls) if call.name == "rename")
    draft, behind = save.calls[renamed].path, save.calls[renamed + 1]
    last = {call.path: call.name for call in save.calls[:renamed] if call.path.is_relative_to(draft)}
    assert len(last) == 6
    assert set(last.values()) == {"fsync"}
    assert (behind.name, behind.path) == ("fsync", draft.parent)


@pytest.fixture(scope="module")
def damage(tmp_path_factory):
    return Damage(tmp_path_factory.mktemp("damage"))


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_made_again(kind, damage):
    damage.trial(DAMAGE[kind])


def test_any_bit_may_flip(damage):
    size = (damage.before / step(3) / MANIFEST).stat().st_size
    for bit in range(7, size * 8, 97):
        damage.trial(lambda folder, bit=bit: flip(folder / MANIFEST, bit))


def test_a_file_on_a_bad_sector_is_damage_too(damage, tmp_path):
    run = Run()
    for _ in range(3):
        run.train(1)
        run.save(tmp_path / "checkpoints")
    before = hashes(tmp_path / "checkpoints" / step(3))

    found, said = unreadable(tmp_path / "checkpoints", errno.EIO, log=tmp_path / "log")

    assert found == [step(1), step(2), f"{step(3)}.damaged-1"]
    assert f"newest {step(2)}" in said
    assert hashes(tmp_path / "checkpoints" / f"{step(3)}.damaged-1") == before


def test_a_failing_disk_is_one_error_that_names_the_file(recipe, tmp_path, straight):
    """Through the command, at the fsync of the second checkpoint's optimizer."""
    out = tmp_path / "out"
    run = forked("train", recipe(SETTINGS), log=tmp_path / "log", before=stand_still)
    traced = Traced(run.pid, out, of=lambda call: (call.name, call.path.name) == ("fsync", OPTIMIZER))

    assert traced.run(2, errno.EIO) == 5, run.said

    assert run.announced == 1
    assert f"\nerror: the disk refuses: Input/output error\n  --> {out}/checkpoints/.tmp-step-0000002-" in run.said
    assert run.said.endswith(f"/{OPTIMIZER}\n  fix: free some space, or give another folder with `--out`\n")
    assert forked("train", tmp_path / "recipe.yaml", "--resume", log=tmp_path / "log").wait() == 0
    assert adapter_bytes(out) == adapter_bytes(straight)


def test_what_a_library_in_rust_says_of_a_full_disk_is_a_fault_of_storage(lora, recipe, tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    def full(*_, **__):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)

    done = lora("train", recipe({"training.max_steps": 1}), code=5)

    assert "error: the disk refuses: No space left on device\n" in done.err
    assert not (tmp_path / "out/adapter_model.safetensors").exists()


def test_a_file_that_may_not_grow_any_more_is_a_fault_of_storage(recipe, tmp_path, straight):
    limit = (straight / "checkpoints" / step(3) / OPTIMIZER).stat().st_size - 1
    run = forked(
        "train",
        recipe(SETTINGS),
        log=tmp_path / "log",
        before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )

    assert run.wait() == 5
    assert "error: the disk refuses: File too large\n  --> " in run.said
    assert forked("train", tmp_path / "recipe.yaml", "--resume", log=tmp_path / "log").wait() == 0
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(straight)
