"""Where a recipe has several sources, each has a loss of its own: exact, however the rows lie in the forwards."""

import json

import pytest
from running import events, lora_process

SETTINGS = {
    "data.train": ["train.jsonl", "short.jsonl"],
    "data.eval": "25%",
    "training.global_batch_size": 6,
    "training.micro_batch_size": 2,
}


@pytest.fixture
def mixed(recipe, tmp_path):
    """mixed({…}) -> a recipe of two sources with different answers."""
    rows = [{"prompt": f"is it {i}?", "completion": ("no", "yes")[i % 2]} for i in range(8)]
    (tmp_path / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lambda changed=None: recipe(SETTINGS | (changed or {}))


def by_source(out) -> list[dict[str, float]]:
    return [event["sources"] for event in events(out) if event["event"] in ("step", "evaluated")]


@pytest.mark.parametrize(
    "changed", [{"training.micro_batch_size": 6}, {"data.packing": False}, {"training.micro_batch_size": 1}]
)
def test_the_loss_of_a_source_does_not_depend_on_the_layout(changed, mixed, lora, tmp_path):
    lora("train", mixed(), "--out", tmp_path / "one")

    lora("train", mixed(changed), "--out", tmp_path / "other")

    assert len(by_source(tmp_path / "one")) == 6
    for mine, theirs in zip(by_source(tmp_path / "other"), by_source(tmp_path / "one"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    assert {name for losses in by_source(tmp_path / "one") for name in losses} == {"train.jsonl", "short.jsonl"}


def test_two_processes_have_the_losses_of_one(mixed, lora, tmp_path):
    lora("train", mixed(), "--out", tmp_path / "one")

    lora_process("train", mixed(), "--out", tmp_path / "two", "--processes", 2)

    for mine, theirs in zip(by_source(tmp_path / "two"), by_source(tmp_path / "one"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_the_losses_of_the_sources_are_those_of_their_rows_alone(mixed, lora, tmp_path):
    """Measured together, and each source in a run of its own with the same rows held out."""
    lora("train", mixed({"data.eval": None}))
    parts = {
        name: lora("eval", "--adapter", tmp_path / "out", "--data", tmp_path / name, "--json").json
        for name in SETTINGS["data.train"]
    }
    tokens = sum(part["tokens"] for part in parts.values())

    found = lora("eval", mixed({"data.eval": "97%"}), "--json").json  # of 20 rows, all but one
    shown = lora("eval", mixed({"data.eval": "97%"})).out

    assert tokens - 12 < found["tokens"] < tokens
    for who in ("base", "adapter"):
        for name, loss in found[who]["sources"].items():
            assert loss == pytest.approx(parts[name][who]["loss"], rel=0.05)
            assert f"{loss:.4f}" in shown


def test_one_source_says_nothing_of_sources(lora, recipe, tmp_path):
    lora("train", recipe({"data.eval": "25%"}))

    assert not [event for event in events(tmp_path / "out") if "sources" in event]
