"""The model card: as the hub and PEFT read it, with the run's numbers, and inert."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard

from lora_cli.runs.card import block, card, code, prose
from lora_cli.runs.history import history_of

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
RECORD = {
    "base": {"name": BASE, "revision": "a" * 40},
    "data": {"train": {"formats": {"tatsu-lab/alpaca": "alpaca"}}, "train_examples": 1407, "files": {}},
    "settings": {"data.train": "tatsu-lab/alpaca", "data.eval": "5%", "lora.r": 8, "lora.targets": "qv"},
    "resolved": {"scale": 2.0},
    "parameters": {"trainable": 1000, "base": 99_000},
    "result": {"train_loss": 1.234, "seconds": 75.0, "peak_bytes": 2e9},
    "proofs": ["frozen base unchanged"],
    "seed": 42,
}
HISTORY = history_of(
    [
        {"event": "started", "step": 0, "steps": 2},
        {"event": "evaluated", "step": 0, "loss": 4.0, "perplexity": 54.6},
        {"event": "sampled", "step": 0, "samples": {"What?": "That."}},
        {"event": "step", "step": 2, "loss": 3.0},
        {"event": "evaluated", "step": 2, "loss": 3.0, "perplexity": 20.1, "accuracy": 0.75},
        {"event": "sampled", "step": 2, "samples": {"What?": "This."}},
        {"event": "finished", "step": 2, "reason": "all steps"},
    ]
)
HOSTILE = [
    "```\n# Heading\n```",
    "<script>alert(1)</script>",
    "](http://evil) ![x](http://evil)",
    "| a | b |\n| - | - |",
    "---\nlicense: mit\n---",
    "'; rm -rf ~; echo '",
    '"); import os; os.system("x") #',
    "\x1b[2J\u202e\u2028",
    "a`b``c```d",
]


def test_the_hubs_client_reads_the_card():
    found = ModelCard(card(RECORD, HISTORY)).data.to_dict()

    assert found == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "datasets": ["tatsu-lab/alpaca"],
        "tags": ["lora", f"base_model:adapter:{BASE}"],
    }


def test_a_run_that_did_not_end_has_no_adapter_to_use_but_the_command_that_goes_on():
    started = history_of([{"event": "started", "step": 0, "steps": 9}, {"event": "evaluated", "step": 0, "loss": 4.0}])
    command = ["lora", "train", "my recipe.yaml", "--overwrite"]
    record = RECORD | {"result": {"reason": "interrupted"}, "sessions": [{"command": command}]}

    text = card(record, started)

    assert "lora train 'my recipe.yaml' --resume\n" in text
    assert "was interrupted at step 0 of 9." in text
    assert "| held-out loss | 4 | – |" in text
    assert "--adapter" not in text


@pytest.mark.parametrize("command", [["curl", "evil"], ["lora", "chat"], ["python", "-c", "x"], []])
def test_a_record_from_elsewhere_names_no_other_command(command):
    record = RECORD | {"result": {"reason": "broken off"}, "sessions": [{"command": command}]}

    assert " --resume" not in card(record, HISTORY)


def test_the_card_carries_the_runs_numbers():
    text = card(RECORD, HISTORY)

    assert "| held-out loss | 4 | 3 |" in text
    assert "| accuracy | – | 0.75 |" in text
    assert "| training loss | – | 1.234 |" in text
    assert "| trained parameters | 1,000 of 100,000 |" in text
    assert "1 min 15 s of training, 2.0 GB of memory at most." in text
    assert "```text\nThat.\n```" in text
    assert f"vllm serve {BASE} --enable-lora --max-lora-rank 16 --lora-modules adapter=." in text


@pytest.mark.parametrize("base", ["models/SmolLM2.gguf", "/home/me/model", "./model", "gpt2"])
def test_a_base_that_is_no_hub_id_is_not_named_to_the_hub(base):
    found = ModelCard(card(RECORD | {"base": {"name": base, "revision": None}}, HISTORY)).data.to_dict()

    assert "base_model" not in found
    assert found["tags"] == ["lora"]


def test_local_files_are_no_datasets_of_the_hub():
    record = RECORD | {
        "settings": {"data.train": ["rows.jsonl", "folder/rows", {"source": "owner/set"}], "data.eval": "eval.csv"},
        "data": {"train": {"formats": {}}, "files": {"folder/rows": {}}},
    }

    assert ModelCard(card(record, HISTORY)).data.to_dict()["datasets"] == ["owner/set"]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_foreign_text_neither_ends_its_place_nor_the_front_matter(text):
    record = json.loads(json.dumps(RECORD).replace("SmolLM2-135M-Instruct", "NAME").replace("tatsu-lab/alpaca", "NAME"))
    record["base"] = {"name": text, "revision": text}
    record["settings"] |= {"data.train": text, "lora.targets": [text], "training.lr_scheduler": text}
    record["data"] |= {"train": {"formats": {text: text}}}
    record |= {"proofs": [text], "loosened": [text], "merges": [{"out": text, "lost": 0.1}], "seed": text}
    events = [
        {"event": "sampled", "step": 0, "samples": {text: text}},
        {"event": "evaluated", "step": 0, "loss": 1.0, text: 0.5},
        {"event": "sampled", "step": 1, "samples": {text: text}},
        {"event": "evaluated", "step": 1, "loss": 1.0, text: 0.5},
    ]

    written = card(record, history_of(events))

    front = yaml.safe_load(written.split("---\n")[1])
    assert front == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora"]}
    headings = [line for line in outside_of_code(written).splitlines() if line.startswith("#")]
    assert headings == ["# A LoRA adapter", "## What was trained", "## Results", "## Samples", "## Use", "## Proofs"]
    assert not [c for c in written if ord(c) < 32 and c != "\n"]
    assert "\u202e" not in written


def outside_of_code(text):
    """The text without its fenced blocks."""
    kept, fence = [], ""
    for line in text.splitlines():
        ticks = line[: len(line) - len(line.lstrip("`"))]
        if not fence and len(ticks) >= 3:
            fence = ticks
        elif fence and line == fence:
            fence = ""
        elif not fence:
            kept.append(line)
    return "\n".join(kept)


def test_code_and_prose_hold_what_is_in_them():
    assert code("a`b") == "``a`b``"
    assert code("`a`") == "`` `a` ``"
    assert prose("a_b *c* <d>") == r"a\_b \*c\* \<d\>"
    assert block("a\n```\nb").startswith("````text\n")


@pytest.mark.parametrize("objective", ["classify", {"kind": "classify"}])
def test_a_classifier_is_one_on_its_card(objective):
    text = card(RECORD | {"settings": RECORD["settings"] | {"training.objective": objective}}, HISTORY)

    assert ModelCard(text).data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification.from_pretrained" in text


def test_an_empty_record_gives_a_card():
    assert "library_name: peft\n" in str(ModelCard(card({}, history_of([]))))
