"""QLoRA's adapters: merged into the base as it is stored, or as nf4 gave it back, whichever is nearer to what was trained."""

import json

import pytest
import torch
import yaml
from adapters import ROWS, answers_of, load, logits_of, write_random
from layers import relative_difference
from running import events
from tiny import tiny_base

from lora_cli.cli.merge import grid_lines
from lora_cli.export.grid import Choice, Grid
from lora_cli.lora.inject import linears
from lora_cli.lora.peft_format import load_adapter
from lora_cli.lora.weights import dense
from lora_cli.models.base import Base
from lora_cli.models.load import load_model

AGREE = 2e-6


def in_nf4(base, dtype=torch.float32):
    return load_model(Base("tiny", base), dtype=dtype, quantize="nf4")


def grid_paragraph(done) -> list[str]:
    lines = done.out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("grid"))
    return lines[first : next(i for i, line in enumerate(lines) if line.startswith("proof"))]


def trained_in_nf4(folder, base, quantize="nf4", **settings):
    """An adapter folder whose recipe says what its base was stored as."""
    out = write_random(folder / "out", base, **settings)
    model = {"base": str(base), "quantize": quantize, "dtype": "float32"}
    (out / "recipe.yaml").write_text(yaml.safe_dump({"model": model, "data": {"train": "x.jsonl"}}))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "phi3"])
def test_a_base_on_the_grid_is_the_quantised_base_bit_for_bit(tmp_path, name, dtype):
    base = tiny_base(tmp_path / "tiny", name, dtype=dtype)
    quantised = in_nf4(base, dtype)
    grid, plain = Grid.of(quantised, dtype), load(base)

    grid.put_on(plain)

    assert grid.paths == {path for path in linears(plain) if not path.endswith("lm_head")}
    for path, module in linears(quantised).items():
        assert torch.equal(dense(module).float(), dense(linears(plain)[path]).float())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("targets", ["all-linear", "qv"])
def test_a_merge_on_the_grid_answers_as_base_in_nf4_and_adapter_did(lora, tmp_path, name, targets):
    base = tiny_base(tmp_path / "tiny", name)
    out = trained_in_nf4(tmp_path, base, targets=targets)
    model = in_nf4(base)
    load_adapter(out).inject_into(model)
    expected = answers_of(model, ROWS)

    told = lora("merge", "--adapter", out, "--out", tmp_path / "merged", "--json").json

    assert told["grid"]["name"] == "nf4"
    assert told["grid"]["kl"]["nf4"] < 1e-9 < 1e-6 < told["grid"]["kl"]["original"]
    for one, other in zip(logits_of(tmp_path / "merged"), expected, strict=True):
        assert relative_difference(one, other) < AGREE
    assert told["proof"]["largest_logit_difference"] < 1e-4
    assert json.loads((tmp_path / "merged/merge.json").read_text())["report"]["grid"] == told["grid"]


def test_asked_for_by_name_the_other_grid_is_taken_and_both_are_told(lora, tmp_path):
    base = tiny_base(tmp_path / "tiny")
    out = trained_in_nf4(tmp_path, base)

    done = lora("merge", "--adapter", out, "--base-grid", "original", "--out", tmp_path / "merged")

    for one, other in zip(logits_of(tmp_path / "merged"), logits_of(base, load_adapter(out)), strict=True):
        assert relative_difference(one, other) < AGREE
    told = json.loads((tmp_path / "merged/merge.json").read_text())["report"]["grid"]
    assert grid_paragraph(done) == [
        "grid                                   KL to what was trained",
        f"         the base as it is stored      {told['kl']['original']:>22.2g}",
        f"         the base as nf4 gave it back  {told['kl']['nf4']:>22.2g}",
        "         merged into the base as it is stored, as --base-grid says",
    ]
    assert told["held_out"] is None


def test_where_the_merge_s_own_rounding_outweighs_nf4_s_the_nearer_is_still_the_one_that_is_taken(lora, tmp_path):
    base = tiny_base(tmp_path / "tiny", dtype=torch.bfloat16)
    out = trained_in_nf4(tmp_path, base, size=0.001)

    told = lora("merge", "--adapter", out, "--out", tmp_path / "merged", "--json").json

    assert told["grid"]["name"] == min(told["grid"]["kl"], key=told["grid"]["kl"].get)
    assert told["dtypes"] == ["bfloat16"]


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_an_adapter_that_was_not_trained_on_nf4_knows_one_grid(lora, tmp_path, quantize):
    base = tiny_base(tmp_path / "tiny")
    out = trained_in_nf4(tmp_path, base, quantize)

    assert lora("merge", "--adapter", out, "--out", tmp_path / "merged", "--json").json["grid"] is None
    done = lora("merge", "--adapter", out, "--base-grid", "nf4", "--out", tmp_path / "other", code=2)
    assert f"the adapter was trained with `model.quantize: {quantize}`" in done.err


def test_an_adapter_from_elsewhere_is_merged_on_the_grid_where_that_is_asked_for(lora, tmp_path):
    base = tiny_base(tmp_path / "tiny", dtype=torch.bfloat16)
    out = write_random(tmp_path / "out", base)

    told = lora("merge", "--adapter", out, "--base-grid", "nf4", "--out", tmp_path / "merged", "--json").json

    assert told["grid"]["asked"]
    assert told["grid"]["name"] == "nf4"


def test_a_weight_that_is_not_where_the_grid_says_stops_the_merge(lora, tmp_path, monkeypatch):
    out = trained_in_nf4(tmp_path, tiny_base(tmp_path / "tiny"), targets="qv")
    monkeypatch.setattr("lora_cli.export.merged._on_grid", lambda *arguments: {})

    done = lora("merge", "--adapter", out, "--out", tmp_path / "merged", code=4)

    assert "does not answer as base + adapter" in done.err
    assert not (tmp_path / "merged").exists()


@pytest.fixture
def qlora_run(lora, recipe, tmp_path):
    """qlora_run(**{"data.eval": …}) -> the run folder of a QLoRA run, and the loss that it ended with on held-out rows."""

    def train(**settings):
        lora("train", recipe({"model.quantize": "nf4", "data.eval": "25%", "training.max_steps": 2} | settings))
        held_out = events(tmp_path / "out", "evaluated")
        return tmp_path / "out", held_out[-1]["loss"] if held_out else None

    return train


def test_both_grids_are_measured_on_the_rows_that_the_run_held_out(lora, qlora_run):
    out, trained = qlora_run()

    done = lora("merge", "--adapter", out)

    told = json.loads((out / "merged/merge.json").read_text())["report"]["grid"]
    assert told["rows"] == 3
    assert told["held_out"]["trained"] == pytest.approx(trained, rel=1e-6)
    assert told["held_out"]["nf4"] == pytest.approx(trained, rel=1e-5)  # stored in float32, that is what was trained
    lines = grid_paragraph(done)
    assert lines[0].endswith("KL to what was trained  loss on 3 held-out rows")
    assert lines[1].startswith("         base(nf4) + adapter, as it was trained  ")
    assert lines[1].endswith(f"  {trained:.4f}")
    assert lines[3].split()[-1] == f"{told['held_out']['nf4']:.4f}"


def test_the_held_out_loss_of_a_grid_is_that_of_the_model_merged_on_it(lora, qlora_run, tmp_path):
    out, _ = qlora_run()

    data = ("--data", tmp_path / "train.jsonl", "--json")

    told = lora("merge", "--adapter", out, "--base-grid", "original", *data).json["grid"]

    measured = lora("eval", "--base", out / "merged", *data).json["base"]
    assert told["rows"] == 12
    assert told["held_out"]["original"] == pytest.approx(measured["loss"], rel=1e-6)


def test_rows_that_are_gone_leave_the_kl(lora, qlora_run, tmp_path):
    out, _ = qlora_run()
    (tmp_path / "train.jsonl").unlink()

    done = lora("merge", "--adapter", out)

    assert "the run's held-out rows can't be read, and the grids are compared by KL alone: data file" in done.err
    assert len(grid_paragraph(done)) == 4


@pytest.mark.parametrize(
    ("losses", "better"), [((2.0, 1.9), None), ((1.9, 2.0), "original"), ((1.99999, 2.0), None)], ids=str
)
def test_where_the_farther_grid_loses_less_it_is_said(losses, better):
    held_out = {"trained": 2.0} | dict(zip(("original", "nf4"), losses, strict=True))
    choice = Choice("nf4", {"original": 0.2, "nf4": 1e-6}, asked=False, held_out=held_out, rows=3)

    assert choice.better == better
    said = [line for line in grid_lines(choice) if "disagree" in line]
    assert bool(said) == bool(better)
    if better:
        assert said == [
            "         the two measures disagree: the base as it is stored loses 0.1000 less; "
            "`--base-grid original` takes it"
        ]
