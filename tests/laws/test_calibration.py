"""A measured step that is far from its prediction: the rest of the run is laid out by it, and stays exactly resumable.

On a CPU prediction and measurement agree, so what is measured is bent here; all else is the real loop.
"""

from contextlib import contextmanager

import pytest
from running import adapter_bytes, events, lora_workers, resumed_after
from same_run import assert_same_curve

from lora_cli.runs import decision, metering

SETTINGS = {
    "training.max_steps": 5,
    "training.global_batch_size": 8,
    "training.save_steps": 1,
    "training.keep_checkpoints": 9,
    "data.packing": False,
}


def bend(setattr, *, factor: float = 1.0, room: float | None = None) -> None:
    """A machine on which a step's peak is so many times what it is here, and so many bytes are free."""
    plain = metering.measured

    @contextmanager
    def measured(device, held):
        with plain(device, held) as peak:
            yield peak
        peak.bytes = round(factor * peak.bytes)

    setattr(metering, "measured", measured)
    if room is not None:
        setattr(decision, "free_host_memory", lambda: room)


@pytest.fixture
def plain(lora, recipe, tmp_path):
    """The run as it is without any shortage, and what its largest step needs."""
    lora("train", recipe(SETTINGS), "--out", tmp_path / "plain")
    [started] = events(tmp_path / "plain", "started")
    return tmp_path / "plain", started["predicted_bytes"]


def test_what_was_predicted_well_changes_nothing(plain, lora, recipe, tmp_path, monkeypatch):
    bend(monkeypatch.setattr, factor=1.03, room=1.2 * plain[1])

    lora("train", recipe(SETTINGS))

    assert not events(tmp_path / "out", "relaid")
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(plain[0])


@pytest.mark.parametrize(("factor", "room", "now"), [(1.6, 1.2, True), (0.7, 0.8, False)], ids=["safer", "faster"])
def test_checkpointing_follows_what_was_measured_and_changes_no_bit(
    factor, room, now, plain, lora, recipe, tmp_path, monkeypatch
):
    bend(monkeypatch.setattr, factor=factor, room=room * plain[1])

    done = lora("train", recipe(SETTINGS | {"training.micro_batch_size": 8}))

    [relaid] = events(tmp_path / "out", "relaid")
    [started] = events(tmp_path / "out", "started")
    assert bool(relaid["gradient_checkpointing"]) == now != bool(started["gradient_checkpointing"])
    assert relaid["step"] == 2
    assert relaid["micro_batch_size"] == started["micro_batch_size"]
    assert f"that is {relaid['factor']:.2f} times what was predicted to come and go: from step 3 on, 8 rows" in done.err
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(plain[0])


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_resumed_run_is_laid_out_as_one_that_was_never_stopped(step, plain, lora, recipe, tmp_path, monkeypatch):
    bend(monkeypatch.setattr, factor=3, room=1.2 * plain[1])
    lora("train", recipe(SETTINGS))
    straight, [relaid] = adapter_bytes(tmp_path / "out"), events(tmp_path / "out", "relaid")
    assert relaid["micro_batch_size"] < 8
    assert_same_curve(tmp_path / "out", plain[0])

    resumed_after(step, tmp_path / "out", recipe(SETTINGS), lora)

    assert adapter_bytes(tmp_path / "out") == straight
    assert events(tmp_path / "out", "relaid") == [relaid]
    started = events(tmp_path / "out", "started")[-1]
    assert started["micro_batch_size"] == (8 if step == 1 else relaid["micro_batch_size"])
    assert len(events(tmp_path / "out", "memory")) == (1 if step == 1 else 2)


def test_what_a_recipe_fixes_stays_and_is_warned_of(plain, lora, recipe, tmp_path, monkeypatch):
    fixed = {"training.micro_batch_size": 8, "training.gradient_checkpointing": False}
    bend(monkeypatch.setattr, factor=2, room=1.2 * plain[1])

    done = lora("train", recipe(SETTINGS | fixed))

    assert not events(tmp_path / "out", "relaid")
    assert "a step of the longest rows may need" in done.err
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(plain[0])


def test_processes_go_by_the_one_that_needs_most(plain, recipe, tmp_path):
    """Each measures its own forwards, and all change together: else they would wait for each other."""

    def one_needs_more(rank: int) -> None:
        bend(setattr, factor=3 if rank == 1 else 1.0, room=1.2 * plain[1])

    lora_workers(2, "train", recipe(SETTINGS), before=one_needs_more)

    [relaid] = events(tmp_path / "out", "relaid")
    assert relaid["gradient_checkpointing"] or relaid["micro_batch_size"] < 4
    assert_same_curve(tmp_path / "out", plain[0])
