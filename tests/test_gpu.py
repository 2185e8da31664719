"""The main job on a CUDA device: what no CPU can show. Skipped where there is none; `make test-gpu` runs it in one call."""

import pytest
import torch
from running import events, write_recipe
from tiny import tiny_base

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

WIDE = {"lora.targets": "qkvogud", "training.max_steps": 6, "training.gradient_checkpointing": True}


@pytest.mark.parametrize(
    "settings",
    [
        {"model.dtype": "float32"},
        {"model.dtype": "bfloat16"},
        {"model.dtype": "bfloat16", "lora.use_dora": True, "lora.init": "pissa"},
        {"model.dtype": "bfloat16", "model.quantize": "nf4"},
        {"model.dtype": "bfloat16", "model.quantize": "int8"},
        {"model.dtype": "bfloat16", "training.optimizer": "paged_adamw_8bit"},
        {"model.dtype": "bfloat16", "lora.dropout": 0.1, "data.packing": False},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_a_run_on_the_gpu_learns_resumes_and_merges(lora, tmp_path, settings):
    base = tiny_base(tmp_path / "base", "llama")
    recipe = write_recipe(tmp_path, base, WIDE | {"training.save_steps": 3} | settings)
    out = tmp_path / "out"

    lora("train", recipe)
    losses = [event["loss"] for event in events(out, "step")]
    lora("train", recipe, "--resume")
    lora("merge", "--adapter", out, "--base", base)

    assert len(losses) == 6
    assert losses[-1] < losses[0]


def test_the_gpu_agrees_with_the_cpu_in_float32(lora, tmp_path, monkeypatch):
    base = tiny_base(tmp_path / "base", "llama")
    recipe = write_recipe(tmp_path, base, WIDE)
    lora("train", recipe)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        lora("train", recipe, "--out", tmp_path / "cpu")

    gpu, cpu = ([event["loss"] for event in events(tmp_path / name, "step")] for name in ("out", "cpu"))
    assert gpu == pytest.approx(cpu, rel=1e-4)
