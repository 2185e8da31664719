"""events.jsonl is read as far as it goes."""

import json

import pytest

from lora_cli.runs.history import history_of, read_history


def lines(*events):
    return "".join(json.dumps(event) + "\n" for event in events)


def step(number, loss=1.0, **more):
    return {"event": "step", "step": number, "loss": loss} | more


@pytest.mark.parametrize(
    "broken",
    [
        b'{"event": "step", "st',
        b"\xff\xfe\x00",
        b"",
        b"[]",
        b"null",
        b'{"step": 1}',
        b'{"event": 3, "step": 1}',
        b'{"event": "step", "step": -1}',
        b'{"event": "step", "step": 1e400}',
        b'{"event": "step", "step": "1"}',
        b"[" * 100_000,
    ],
)
def test_a_line_that_is_no_event_is_counted_and_passed_over(broken, tmp_path):
    file = tmp_path / "events.jsonl"
    file.write_bytes(lines(step(1, 2.0)).encode() + broken + b"\n" + lines(step(2, 1.5)).encode())

    history = read_history(file)

    assert history.curve("loss") == [(1, 2.0), (2, 1.5)]
    assert history.damaged == 1


def test_no_file_is_no_history(tmp_path):
    assert read_history(tmp_path / "events.jsonl").last_step == 0


def test_what_a_resumed_run_does_again_takes_the_place_of_what_it_did_before():
    history = history_of(
        [
            {"event": "started", "step": 0, "steps": 4},
            *(step(number, 10.0 + number) for number in (1, 2, 3)),
            {"event": "evaluated", "step": 3, "loss": 9.0},
            {"event": "started", "step": 2, "steps": 4},
            step(3, 3.0),
            step(4, 4.0),
            {"event": "finished", "step": 4, "reason": "all steps"},
        ]
    )

    assert history.curve("loss") == [(1, 11.0), (2, 12.0), (3, 3.0), (4, 4.0)]
    assert history.evaluated() == []
    assert history.finished["reason"] == "all steps"
    assert history.planned_steps == 4


def test_a_run_that_goes_on_after_its_end_is_not_finished():
    events = [{"event": "finished", "step": 2}, {"event": "started", "step": 2, "steps": 4}]

    assert history_of(events).finished is None


def test_values_that_are_no_numbers_are_no_points():
    events = [step(1, float("nan")), step(2, None), step(3, "x"), step(4, True), step(5, 10**400), step(6, 0.5)]

    assert history_of(events).curve("loss") == [(6, 0.5)]


def test_unknown_events_and_metrics_are_kept():
    measured = {
        "event": "evaluated",
        "step": 2,
        "loss": 1.0,
        "perplexity": 2.7,
        "tokens": 9,
        "best": True,
        "accuracy": 0.5,
    }
    history = history_of([{"event": "skipped", "step": 1, "rows": ["a:1"]}, measured])

    assert [event["rows"] for event in history.named("skipped")] == [["a:1"]]
    assert history.metrics() == ["accuracy"]
    assert history.evaluated("accuracy") == [(2, 0.5)]


@pytest.mark.parametrize("of_source", [lambda loss: loss, lambda loss: {"loss": loss, "tokens": 3}])
def test_steps_may_carry_the_loss_of_each_source(of_source):
    events = [step(1, sources={"a": of_source(1.0), "b": of_source(2.0)}), step(2, sources={"a": of_source(0.5)})]

    assert history_of(events).sources() == {"a": [(1, 1.0), (2, 0.5)], "b": [(1, 2.0)]}
