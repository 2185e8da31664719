"""The main job on a real pretrained model, through the command line: SmolLM2-135M-Instruct on the Jargon File."""

import json

import pytest
from running import ROOT, events

pytestmark = pytest.mark.real


def test_a_real_model_is_trained_measured_and_merged(lora, smollm2_gguf, tmp_path):
    rows = (ROOT / "recipes/jargon/jargon.jsonl").read_text().splitlines(keepends=True)[:40]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(
        f"""
model: {{base: {smollm2_gguf}}}
lora: {{r: 8, targets: qv}}
data: {{train: rows.jsonl, eval: 10%, max_length: 96}}
training: {{max_steps: 6, global_batch_size: 4, learning_rate: 5e-3, warmup_ratio: 0}}
output: {out}
"""
    )

    lora("train", recipe)
    measured = lora("eval", recipe, "--json").json
    merged = lora("merge", "--adapter", out, "--json").json

    before, after = (event["loss"] for event in events(out, "evaluated"))
    assert 3 < before < 6, "the base knows English"
    assert after < before - 0.2
    assert measured["base"]["loss"] == pytest.approx(before, rel=1e-4)
    assert measured["adapter"]["loss"] == pytest.approx(after, rel=1e-4)
    assert merged["proof"]["kl"] < 0.01 * merged["proof"]["adapter_kl"]
    assert json.loads((out / "run.json").read_text())["proofs"]
