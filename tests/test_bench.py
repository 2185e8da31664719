"""scripts/bench.py: everyone trains on the same rows, so everyone has the same losses."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from tiny import CONFIGS, ENCODERS, EXPERTS, byte_tokenizer, tiny_base

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
bench, contestants, rows = (importlib.import_module(name) for name in ("bench", "bench_contestants", "bench_rows"))
before = importlib.import_module("bench_before")


class Recorded:
    """Turns that never wait, and keep what is told."""

    def __init__(self):
        self.losses = []

    def begin(self):
        pass

    def end(self, loss):
        self.losses.append(loss)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    base = tiny_base(tmp_path_factory.mktemp("bench") / "llama")
    made = rows.rows_of(rows.mixed_lengths(12, 6, 40), byte_tokenizer())
    steps = [made[i : i + 4] for i in range(0, 12, 4)]
    return contestants.Setting(base, torch.float32, steps, size=2, packed=48, tokens=96)


@pytest.fixture(scope="module")
def plain(setting):
    return losses_of("PEFT", setting)


def losses_of(name, setting):
    turns = Recorded()
    contestants.CONTESTANTS[name].run(setting, turns)
    return turns.losses


@pytest.mark.filterwarnings("ignore")  # what others deprecate
@pytest.mark.parametrize("name", ["lora", "lora, padded", "lora, by length", "TRL"])
def test_everyone_has_the_losses_of_a_peft_loop(name, setting, plain):
    if not contestants.CONTESTANTS[name].can_run("cpu"):
        pytest.skip("its packages are not installed")

    found = losses_of(name, setting)

    assert len(found) == 3
    assert found == pytest.approx(plain, rel=1e-4)
    assert found[2] != pytest.approx(found[0], rel=1e-4)


def test_a_step_owes_no_work_for_padding(setting):
    [one, two, *_] = setting.steps[0]

    assert bench.operations_of([one, two], setting) == bench.operations_of([one], setting) + bench.operations_of(
        [two], setting
    )


def test_losses_that_differ_are_told(setting, capsys):
    race = bench.Race("a race", setting, ("PEFT", "lora"))

    same = bench.losses_agree(race, {"PEFT": bench.Result(losses=[5.0]), "lora": bench.Result(losses=[5.0001])})
    other = bench.losses_agree(race, {"PEFT": bench.Result(losses=[5.1]), "lora": bench.Result(losses=[5.0])})

    assert same
    assert not other
    assert "PEFT has losses 2.0e-02 from ours" in capsys.readouterr().err


def test_the_table_counts_tokens_of_rows_and_divides_turn_by_turn(setting):
    race = bench.Race("a race", setting, ("PEFT", "lora"))
    results = {
        "PEFT": bench.Result([2.0, 4.0], [5.0, 4.0, 3.0], 1000),
        "lora": bench.Result([1.0, 2.0], [5.0, 4.0, 3.0], 500),
    }

    lines = bench.table(race, results, rate=1e9).splitlines()

    assert "2.00 ×" in lines[3]
    assert lines[3].startswith("| **lora** |")
    assert "the same for all" in lines[5]


def test_every_architecture_is_held_against_older_code():
    assert {case.config for case in before.CASES.values()} >= {*CONFIGS.values(), *EXPERTS.values(), *ENCODERS.values()}


def test_a_slower_step_and_other_losses_are_told():
    old = bench.Result([1.0] * 4, [5.0, 4.0])

    assert not list(before.complaints("llama", old, bench.Result([1.04] * 4, [5.0, 4.0])))
    assert list(before.complaints("llama", old, bench.Result([1.2] * 4, [5.0, 4.1]))) == [
        "llama: losses are 2.5e-02 apart",
        "llama: 1.20 times as slow as before",
    ]
    assert not list(before.complaints("llama", bench.Result(failed="unknown"), old))
    assert list(before.complaints("llama", old, bench.Result(failed="broken"))) == ["llama: broken"]
