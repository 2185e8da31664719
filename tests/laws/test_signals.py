"""A signal in any phase: what was done is saved, the exit code says so, and the run goes on to the same bytes."""

import signal
import time

import pytest
from faults import at_call, forked, send
from running import adapter_bytes, events, hashes

from lora_cli.objectives.table import OBJECTIVES

# 9 rows to train on, 3 held out: 6 forwards a step, 3 an evaluation
SETTINGS = {
    "training.global_batch_size": 6,
    "training.micro_batch_size": 1,
    "training.max_steps": 6,
    "training.save_steps": 4,
    "training.eval_steps": 3,
    "training.early_stopping_patience": 9,
    "training.sample_prompts": ["what is the cat?"],
    "data.eval": "25%",
    "data.packing": False,
    "lora.dropout": 0.1,
}
FORWARDS = 3  # before the first step
TRAIN = "lora_cli.runs.train"


def hit(monkeypatch, where: str, number: int, call: int = 1) -> None:
    """Send the signal before the function `where` is called for that time."""
    module, _, name = where.rpartition(".")
    found = __import__(module, fromlist=[name])
    monkeypatch.setattr(found, name, at_call(call, getattr(found, name), settle(number)))


def hit_forward(monkeypatch, number: int, call: int) -> None:
    monkeypatch.setitem(OBJECTIVES, "sft", at_call(call, OBJECTIVES["sft"], settle(number)))


def settle(number: int):
    """The signal, and a moment for the thread that notes it."""

    def act() -> None:
        send(number)()
        time.sleep(0.01)

    return act


@pytest.mark.parametrize("where", ["load_rows", "load_model", "frozen_digest"])
def test_before_the_first_step_there_is_nothing_to_save_and_nothing_stays(where, lora, recipe, tmp_path, monkeypatch):
    hit(monkeypatch, f"{TRAIN}.{where}", signal.SIGTERM)

    done = lora("train", recipe(SETTINGS), code=143)

    assert "error:" not in done.err
    assert not (tmp_path / "out").exists()


PHASES = {
    "the first evaluation": (lambda patch, number: hit_forward(patch, number, 2), 0),
    "the first step": (lambda patch, number: hit_forward(patch, number, FORWARDS + 2), 0),
    "between two forwards": (lambda patch, number: hit_forward(patch, number, FORWARDS + 6 + 3), 1),
    "an evaluation": (lambda patch, number: hit_forward(patch, number, FORWARDS + 3 * 6 + 2), 3),
    "sampling": (lambda patch, number: hit(patch, f"{TRAIN}.answer", number, 2), 3),
    "saving": (lambda patch, number: hit(patch, "lora_cli.train.checkpoint.write_synced", number, 2), 4),
    "the last evaluation": (lambda patch, number: hit_forward(patch, number, 2 * FORWARDS + 6 * 6 + 2), 6),
}


CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 143}
CASES = [(phase, "SIGTERM") for phase in PHASES] + [("between two forwards", "SIGINT"), ("saving", "SIGUSR1")]


@pytest.mark.parametrize(("phase", "name"), CASES)
def test_in_every_phase_the_run_is_saved_and_goes_on_to_the_same_bytes(
    phase, name, straight, lora, recipe, tmp_path, monkeypatch
):
    strike, step = PHASES[phase]
    with monkeypatch.context() as patch:
        strike(patch, signal.Signals[name])
        done = lora("train", recipe(SETTINGS), code=CODES[name])

    file = tmp_path / "recipe.yaml"
    *_, said, command = done.err.splitlines()
    state = f"step {step} is saved" if step else "no step was done yet"
    assert said == f"interrupted by {name}; {state}; continue with"
    assert command == f"lora train {file} --resume"
    assert events(tmp_path / "out")[-1] == {"event": "interrupted", "step": step, "saved": step}

    lora("train", file, "--resume")
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(straight)
    for kind, key in (("step", "loss"), ("evaluated", "loss"), ("sampled", "samples")):
        assert [(e["step"], e[key]) for e in events(tmp_path / "out", kind)] == [
            (e["step"], e[key]) for e in events(straight, kind)
        ]


def test_a_run_that_is_writing_its_result_ends_well(straight, lora, recipe, tmp_path, monkeypatch):
    hit(monkeypatch, f"{TRAIN}.write_proof_rows", signal.SIGTERM)

    lora("train", recipe(SETTINGS))

    assert adapter_bytes(tmp_path / "out") == adapter_bytes(straight)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_at_once_with_the_same_code(number, recipe, tmp_path):
    def hang() -> None:
        def twice() -> None:
            send(number)()
            time.sleep(0.05)
            send(number)()
            time.sleep(60)

        OBJECTIVES["sft"] = at_call(FORWARDS + 8, OBJECTIVES["sft"], twice)

    began = time.monotonic()
    run = forked("train", recipe(SETTINGS), log=tmp_path / "log", before=hang)

    assert run.wait() == (130 if number == signal.SIGINT else 143)
    assert time.monotonic() - began < 50
    assert run.announced == 0


def test_a_forward_that_does_not_end_is_left_when_the_grace_time_is_over(recipe, tmp_path):
    def hang() -> None:
        def once() -> None:
            send(signal.SIGTERM)()
            time.sleep(60)

        OBJECTIVES["sft"] = at_call(FORWARDS + 8, OBJECTIVES["sft"], once)

    run = forked("train", recipe(SETTINGS), "--grace", "0.1", log=tmp_path / "log", before=hang)

    assert run.wait() == 143
    assert run.said.endswith("not done within the grace time: leaving now; the last checkpoint stands\n")


@pytest.mark.parametrize("arguments", [("merge",), ("export", "--to", "peft")], ids=["merge", "export"])
def test_a_merge_or_export_that_is_interrupted_leaves_nothing_behind(arguments, straight, lora, tmp_path, monkeypatch):
    before = hashes(tmp_path)
    hit(monkeypatch, "lora_cli.export.staging.sync_path", signal.SIGTERM, 2)

    done = lora(*arguments, "--adapter", straight, "--out", tmp_path / "made", code=143)

    assert "error:" not in done.err
    assert hashes(tmp_path) == before
    assert not (tmp_path / "made").exists()
