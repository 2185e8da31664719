"""`lora.new_tokens` on its whole way through the command line: longer tables, and an adapter that brings them along."""

import json

import pytest
import torch
from gguf import GGUFReader
from layers import relative_difference
from peft import PeftModel
from running import hashes, trained_and_resumed
from tiny import TOKENS, VOCABULARY, tiny_base, tiny_encoder
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_cli.lora.peft_format import load_adapter
from lora_cli.lora.tokens import ROWS

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SPARE = VOCABULARY - TOKENS
NEW = [f"<tag-{i}>" for i in range(SPARE + 2)]
RUN = {"data.eval": "25%", "training.save_steps": 2, "training.max_steps": 8, "lora.new_tokens": NEW}
BASES = {
    "untied": ("llama", {}),
    "tied": ("llama-tied", {}),
    "scaled, nf4": ("gemma", {"model.quantize": "nf4"}),
    "eva": ("llama", {"lora.init": "eva", "lora.use_dora": True}),
    "gpt2": ("gpt2", {"lora.trainable_tokens": ["<|im_end|>"]}),
}


def write_tagged(file):
    """Questions between new tokens, and answers with others in them."""
    rows = [
        {"prompt": f"{NEW[-1]}what is {i}?{NEW[0]}", "completion": f"{NEW[-2]} the cat {i % 3}{NEW[i % 5]}"}
        for i in range(16)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("case", BASES)
def test_new_tokens_go_all_the_way(case, lora, recipe, tmp_path):
    name, settings = BASES[case]
    base, out = tiny_base(tmp_path / "base", name), tmp_path / "out"
    before = hashes(base)
    file = recipe(RUN | settings, base=base)
    write_tagged(tmp_path / "train.jsonl")

    assert "every token is one of the model's 322" in lora("check", file).out
    _, last = trained_and_resumed(file, out, lora)

    # the folder and the base are enough: for us, and for PEFT
    measured = lora("eval", file, "--json").json
    assert measured["adapter"]["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert "base" in lora("generate", "--adapter", out, "--prompt", f"{NEW[-1]}what is 1?").out
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer(f"{NEW[-1]}what is 3?{NEW[0]}", return_tensors="pt")["input_ids"]
    assert ids.max() == VOCABULARY + 1 == len(tokenizer) - 1
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    expected = logits(PeftModel.from_pretrained(theirs, out), ids)
    ours = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    load_adapter(out).inject_into(ours)
    assert relative_difference(logits(ours, ids), expected) <= 2e-6

    # merged, it is a model with a larger vocabulary, whose tokenizer stands beside it
    lora("merge", "--adapter", out, "--base-grid", "original")
    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    assert merged.config.vocab_size == VOCABULARY + 2
    assert relative_difference(logits(merged, ids), expected) <= 2e-6
    assert AutoTokenizer.from_pretrained(out / "merged")(NEW[-1])["input_ids"][-1] == VOCABULARY + 1
    assert hashes(base) == before


def test_other_formats_hold_them_or_are_refused(lora, recipe, tmp_path):
    out = tmp_path / "out"
    file = recipe(RUN | {"training.max_steps": 2})
    write_tagged(tmp_path / "train.jsonl")
    lora("train", file)

    lora("export", "--adapter", out, "--to", "gguf", "--out", tmp_path / "model.gguf")
    lora("merge", "--adapter", out)
    assert "modules trained whole" in lora("check", file, "--for", "vllm", code=4).out
    assert lora("export", "--adapter", out, "--to", "vllm", "--out", tmp_path / "served", code=4)
    refused = lora("unmerge", "--merged", out / "merged", "--adapter", out, "--out", tmp_path / "again", code=4)
    assert "can't be taken off again" in refused.err

    tokens = GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert tokens[-2:] == NEW[-2:]


def test_a_classifier_reads_new_tokens(lora, recipe, tmp_path):
    base, out = tiny_encoder(tmp_path / "base"), tmp_path / "out"
    settings = {"training.objective": "classify", "lora.new_tokens": NEW, "lora.targets": "qv", "data.eval": "25%"}
    file = recipe(settings, base=base)
    labels = {NEW[-1]: "first", NEW[-2]: "second"}
    rows = [{"text": f"what is {i} {token}", "label": label} for i in range(12) for token, label in labels.items()]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    lora("train", file)
    lora("merge", "--adapter", out)

    rows = load_adapter(out).extras["bert.embeddings.word_embeddings"][ROWS]
    assert not torch.equal(rows[-1], rows[-2])  # they started at one mean
    data = ("--data", tmp_path / "train.jsonl", "--json")
    adapted = lora("eval", "--adapter", out, *data).json["adapter"]
    merged = lora("eval", "--base", out / "merged", *data).json["base"]
    assert merged["loss"] == pytest.approx(adapted["loss"], rel=1e-5)
