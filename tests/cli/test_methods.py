"""Every method on its whole way through the command line: recipe, training, PEFT, evaluation, merge, resumption."""

import logging
import shutil

import pytest
import torch
from layers import relative_difference
from peft import PeftModel
from running import adapter_bytes, events, hashes, lora_workers, resumed_after, trained_and_resumed
from tiny import tiny_base
from transformers import AutoModelForCausalLM

from lora_cli.lora.completion import load_for
from lora_cli.lora.peft_format import load_adapter
from lora_cli.models.base import Base
from lora_cli.models.load import load_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[5, 17, 200, 31, 8, 90, 41]])
RUN = {"data.eval": "25%", "training.save_steps": 2, "lora.dropout": 0.1, "training.weight_decay": 0.01}

METHODS: dict[str, dict] = {
    "rsLoRA": {"lora.use_rslora": True},
    "DoRA": {"lora.use_dora": True},
    "LoRA+": {"training.loraplus_lr_ratio": 4, "training.learning_rate": 0.005},
    "LoRA-FA": {"lora.freeze_A": True},
    "LoRA-FA over PiSSA": {"lora.freeze_A": True, "lora.init": "pissa"},
    "gaussian": {"lora.init": "gaussian"},
    "PiSSA": {"lora.init": "pissa"},
    "OLoRA": {"lora.init": "olora"},
    "orthogonal": {"lora.init": "orthogonal"},
    "EVA": {"lora.init": "eva"},
    "LoftQ": {"lora.init": "loftq", "model.quantize": "nf4"},
    "LoftQ in int8, DoRA": {"lora.init": "loftq", "model.quantize": "int8", "lora.use_dora": True},
    "bias: lora_only": {"lora.bias": "lora_only", "model.base": "qwen2", "lora.use_dora": True},
    "bias: all": {"lora.bias": "all", "model.base": "gpt2"},
    "bias: all, nf4": {"lora.bias": "all", "model.base": "opt", "model.quantize": "nf4"},
    "tokens": {"lora.trainable_tokens": ["<|im_end|>", "<s>"]},
    "tokens, tied": {"lora.trainable_tokens": ["<|im_end|>", "<s>"], "model.base": "llama-tied"},
    "tokens, tied, scaled": {"lora.trainable_tokens": ["<|im_end|>"], "model.base": "gemma", "model.quantize": "nf4"},
    "patterns": {"lora.rank_pattern": {"q_proj": 2}, "lora.alpha_pattern": {"v_proj": 3}, "lora.layers": [1]},
}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("method", METHODS)
def test_a_method_goes_all_the_way(method, lora, recipe, tiny_llama, tmp_path):
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    settings, out = dict(METHODS[method]), tmp_path / "out"
    name = settings.pop("model.base", None)
    base = tiny_base(tmp_path / "base", name) if name else tiny_llama
    before = hashes(base)
    file = recipe(RUN | settings, base=base)
    quantize = settings.get("model.quantize", "none")

    first, last = trained_and_resumed(file, out, lora)

    measured = lora("eval", file, "--json").json
    if settings.get("lora.init") != "loftq":
        assert measured["base"]["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert measured["adapter"]["loss"] == pytest.approx(last["loss"], rel=1e-5)

    ours = load_model(Base("tiny", base), dtype=torch.float32, quantize=quantize)
    load_adapter(out).inject_into(ours)
    peft_model = PeftModel.from_pretrained(load_model(Base("tiny", base), dtype=torch.float32, quantize=quantize), out)
    assert relative_difference(logits(peft_model), logits(ours)) <= 2e-6

    lora("merge", "--adapter", out, "--base-grid", "original")
    if quantize != "none":
        ours = load_model(Base("tiny", base), dtype=torch.float32)
        load_for(out).inject_into(ours)
    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    assert relative_difference(logits(merged), logits(ours)) <= 2e-6
    assert hashes(base) == before


def test_with_a_frozen_A_only_B_has_moved(lora, recipe, tmp_path):
    """LoRA-FA (Zhang et al. 2023, section 3.1): A is what it was at the start, and is in the adapter's file."""
    lora("train", recipe({"lora.freeze_A": True, "training.save_steps": 1}))

    early, late = (load_adapter(tmp_path / "out" / name) for name in ("checkpoints/step-0000003", "."))
    started = events(tmp_path / "out", "started")[0]

    assert started["parameters"] == sum(factors.B.numel() for factors in late.layers.values())
    for path, factors in late.layers.items():
        assert factors.A.any()
        assert torch.equal(factors.A, early.layers[path].A)
        assert not torch.equal(factors.B, early.layers[path].B)


def test_loraplus_tells_the_rate_of_A_and_the_page_and_card_both(lora, recipe, tmp_path):
    lora("train", recipe({"training.loraplus_lr_ratio": 16, "training.lr_scheduler": "constant"}))

    assert {event["lr"] for event in events(tmp_path / "out", "step")} == {0.02}
    assert "| learning rate | 0.02 (B: 0.32), constant |" in (tmp_path / "out/README.md").read_text()
    assert "training.loraplus_lr_ratio" in (tmp_path / "out/report.html").read_text()


def test_loftq_starts_nearer_to_the_unquantised_base_and_is_merged_into_it_as_what_training_changed(
    lora, recipe, tiny_llama, tmp_path
):
    """Li et al. 2023: Q + scale · B A ≈ W at the start; W itself needs no completion, so the start is taken off there."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    out, base = tmp_path / "out", Base("tiny", tiny_llama)
    lora("train", recipe({"model.quantize": "nf4", "lora.init": "loftq", "lora.r": 16}))
    whole, quantised = (load_model(base, dtype=torch.float32, quantize=quantize) for quantize in ("none", "nf4"))
    expected, rounded = logits(whole), logits(quantised)

    start, trained = load_adapter(out / "start"), load_adapter(out)
    start.inject_into(quantised)
    assert (logits(quantised) - expected).norm() < 0.7 * (rounded - expected).norm()
    assert trained.completes == "nf4"

    found = load_for(out)
    assert found.completes is None
    for path, factors in found.layers.items():
        ours, theirs = (a.layers[path].B.double() @ a.layers[path].A.double() for a in (trained, start))
        torch.testing.assert_close(factors.B.double() @ factors.A.double(), ours - theirs, atol=1e-6, rtol=1e-5)
    assert load_for(out / "checkpoints/step-0000004").digest() == found.digest()

    lora("merge", "--adapter", out, "--base-grid", "nf4")  # as it was trained, on what nf4 stands for
    as_trained = load_model(base, dtype=torch.float32, quantize="nf4")
    trained.inject_into(as_trained)
    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    assert relative_difference(logits(merged), logits(as_trained)) <= 1e-5

    shutil.rmtree(out / "start")
    refused = lora("merge", "--adapter", out, "--out", tmp_path / "again", code=4)
    assert "completes the base quantised to nf4 (LoftQ), and its start is not beside it" in refused.err


def test_eva_gives_each_module_the_rank_that_its_inputs_ask_for_and_keeps_its_scale(lora, recipe, tmp_path):
    out = tmp_path / "out"
    lora("train", recipe({"lora.init": "eva", "lora.r": 4, "lora.alpha": 12, "lora.eva_rho": 1.5}))

    adapter = load_adapter(out)
    ranks = {path: len(factors.A) for path, factors in adapter.layers.items()}
    assert sum(ranks.values()) == 4 * 14
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 6
    assert {adapter.config.at(path).scale for path in ranks} == {3.0}
    assert events(out, "started")[0]["parameters"] == adapter.parameters


def test_eva_is_the_same_in_two_processes_and_is_not_computed_again_by_a_run_that_goes_on(
    lora, recipe, tmp_path, monkeypatch
):
    file = recipe({"lora.init": "eva", "training.save_steps": 2, "lora.freeze_A": True})
    lora("train", file, "--out", tmp_path / "out")
    lora_workers(2, "train", file, "--out", tmp_path / "two")

    one, two = (load_adapter(tmp_path / name) for name in ("out", "two"))
    assert one.config == two.config
    assert all(torch.equal(one.layers[path].A, two.layers[path].A) for path in one.layers)

    straight = adapter_bytes(tmp_path / "out")
    monkeypatch.setattr("lora_cli.runs.starts.principal_directions", None)
    resumed_after(2, tmp_path / "out", file, lora)
    assert adapter_bytes(tmp_path / "out") == straight
