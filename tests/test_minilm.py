"""A real encoder through the command line: all-MiniLM-L6-v2 tells what definitions of WordNet are about."""

import json

import pytest
from running import ROOT, events

pytestmark = pytest.mark.real

ROWS = ROOT / "recipes/wordnet-classes/wn_class.jsonl"
LABELS = ("noun.animal", "noun.food", "noun.person")


def test_a_real_encoder_is_trained_measured_and_merged(lora, minilm, tmp_path):
    found = [line for line in ROWS.read_text().splitlines(keepends=True) if json.loads(line)["label"] in LABELS]
    (tmp_path / "rows.jsonl").write_text("".join(found[:240]))
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(
        f"""
model: {{base: {minilm}, dtype: float32}}
lora: {{r: 8, targets: qv}}
data: {{train: rows.jsonl, eval: 25%, max_length: 32}}
training: {{objective: classify, max_steps: 24, global_batch_size: 16, learning_rate: 5e-3, warmup_ratio: 0}}
output: {out}
"""
    )

    lora("train", recipe)
    measured = lora("eval", recipe, "--json").json
    merged = lora("merge", "--adapter", out, "--json").json

    before, after = (event["accuracy"] for event in events(out, "evaluated"))
    assert before < 0.6 < 0.8 < after
    assert measured["adapter"]["accuracy"] == pytest.approx(after)
    assert measured["majority"]["accuracy"] < 0.5
    assert merged["proof"]["kl"] < 1e-6 < merged["proof"]["adapter_kl"]
