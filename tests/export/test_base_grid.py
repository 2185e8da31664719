"""QLoRA's adapters: merged into the base as it is stored, or as nf4 gave it back, whichever is nearer to what was trained."""

import json

import pytest
import torch
import yaml
from adapters import ROWS, answers_of, load, logits_of, write_random
from layers import relative_difference
from tiny import tiny_base

from lora_cli.export.grid import Grid
from lora_cli.lora.inject import linears
from lora_cli.lora.peft_format import load_adapter
from lora_cli.lora.weights import dense
from lora_cli.models.base import Base
from lora_cli.models.load import load_model

AGREE = 2e-6


def in_nf4(base, dtype=torch.float32):
    return load_model(Base("tiny", base), dtype=dtype, quantize="nf4")


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
    lines = [line for line in done.out.splitlines() if "nf4" in line or "--base-grid" in line]
    assert lines[0].startswith("grid     KL to base(nf4) + adapter, as it was trained: 0.0")
    assert "into the base as it is stored, " in lines[0]
    assert lines[0].endswith(" into the base as nf4 gave it back")
    assert lines[1] == "         merged into the base as it is stored, as --base-grid says"


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
