"""`lora sweep --search`: values chosen by what came of those before, hopeless runs given up, and no run done twice."""

import json

import pytest
from running import events, hashes

SETTINGS = {"training.max_steps": 3, "training.eval_steps": 1, "data.eval": "20%"}
RATES = ["--search", "training.learning_rate=1e-6..1e-1", "--search", "lora.r=2,4"]


def names(done) -> list[str]:
    return sorted(run["name"] for run in done.json["runs"])


def test_every_trial_is_a_run_and_the_hopeless_ones_are_given_up(lora, recipe, tmp_path):
    done = lora("sweep", recipe(SETTINGS), *RATES, "--trials", 7, "--json")

    runs = {run["name"][:3]: run for run in done.json["runs"]}
    assert sorted(runs) == [f"00{number}" for number in range(1, 8)]
    for run in runs.values():
        assert 1e-6 <= float(run["settings"]["training.learning_rate"]) <= 1e-1
        assert run["settings"]["lora.r"] in ("2", "4")
    assert all(runs[number]["state"] == "finished" for number in ("001", "002", "003", "004"))
    for run in runs.values():
        if run["state"] == "given up":
            before = [
                events(tmp_path / "out-sweep" / other["name"], "evaluated")
                for other in runs.values()
                if other["name"] < run["name"]
            ]
            losses = sorted(told[run["step"]]["loss"] for told in before if len(told) > run["step"])
            assert run["loss"] > losses[(len(losses) - 1) // 2]
    assert "given up" in {run["state"] for run in runs.values()}


def test_the_same_search_twice_tries_the_same(lora, recipe, tmp_path):
    file = recipe(SETTINGS)

    once, again = (lora("sweep", file, *RATES, "--trials", 2, "--out", tmp_path / way, "--json") for way in ("a", "b"))

    assert names(once) == names(again)


def test_a_search_that_goes_on_does_nothing_twice(lora, recipe, tmp_path):
    file = recipe(SETTINGS)
    first = lora("sweep", file, *RATES, "--trials", 2, "--json")
    before = {name: hashes(tmp_path / "out-sweep" / name) for name in names(first)}

    more = lora("sweep", file, *RATES, "--trials", 3, "--resume", "--json")

    assert names(more)[:2] == names(first)
    assert len(names(more)) == 3
    assert {name: hashes(tmp_path / "out-sweep" / name) for name in names(first)} == before


def test_a_run_that_was_interrupted_is_taken_up_first(lora, recipe, tmp_path):
    file = recipe(SETTINGS)
    first = lora("sweep", file, *RATES, "--trials", 2, "--json")
    last = tmp_path / "out-sweep" / names(first)[1]
    record = json.loads((last / "run.json").read_text())
    del record["adapter"], record["result"]  # as a kill before the end leaves it
    (last / "run.json").write_text(json.dumps(record))

    more = lora("sweep", file, *RATES, "--trials", 2, "--resume", "--json")

    assert names(more) == names(first)
    assert {run["state"] for run in more.json["runs"]} == {"finished"}


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (["--search", "lora.r=64..4"], {}, "the range of `lora.r` does not begin below its end"),
        (["--search", "lora.r=few..4"], {}, "the range of `lora.r` is not from a number to a number"),
        (["--search", "lora.r=0..4"], {}, "--search lora.r=0"),
        (["--search", "lora.r=4,8", "--grid", "lora.r=4,8"], {}, "exclude each other"),
        (["--search", "lora.r=4,8", "--together"], {}, "leave out `--together`"),
        (["--search", "lora.r=4,8"], {"data.eval": None, "training.eval_steps": None}, "set `data.eval: 5%`"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(arguments, settings, message, lora, recipe, tmp_path):
    done = lora("sweep", recipe(SETTINGS | settings), *arguments, code=2)

    assert message in done.err
    assert not (tmp_path / "out-sweep").exists()
