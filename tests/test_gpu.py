"""The main job on a CUDA device: what no CPU can show. Skipped where there is none; `make test-gpu` runs it in one call."""

import pytest
import torch
from running import ROOT, events, lora_process, write_recipe
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


@pytest.mark.parametrize(
    "settings",
    [
        {"model.dtype": "float32"},
        {"model.dtype": "bfloat16", "training.sample_prompts": ["what"], "data.eval": "20%"},
        {"model.dtype": "bfloat16", "model.quantize": "nf4"},
        {"model.dtype": "bfloat16", "lora.use_dora": True, "lora.init": "pissa"},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_in_shards_the_gpu_trains_the_same(lora, tmp_path, settings):
    """A worker by itself has every shard: what can be tried of FSDP2 and NCCL on one GPU."""
    recipe = write_recipe(tmp_path, tiny_base(tmp_path / "base", "llama"), WIDE | settings)
    lora("train", recipe, "--out", tmp_path / "whole")

    lora_process("train", recipe, "--processes", 1, "--on", "fsdp2", "--out", tmp_path / "shards", folder=ROOT)
    lora_process("train", recipe, "--resume", "--out", tmp_path / "shards")

    found, expected = ([e["loss"] for e in events(tmp_path / name, "step")] for name in ("shards", "whole"))
    assert found == pytest.approx(expected, rel=1e-4 if settings["model.dtype"] == "float32" else 2e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("profile", ["ddp", "fsdp2"])
def test_two_gpus_train_as_one(lora, tmp_path, profile):
    recipe = write_recipe(tmp_path, tiny_base(tmp_path / "base", "llama"), WIDE | {"model.dtype": "float32"})
    lora("train", recipe, "--processes", 1, "--out", tmp_path / "one")

    lora_process("train", recipe, "--processes", 2, "--on", profile, "--out", tmp_path / "two", folder=ROOT)

    found, expected = ([e["loss"] for e in events(tmp_path / name, "step")] for name in ("two", "one"))
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_gpu_agrees_with_the_cpu_in_float32(lora, tmp_path, monkeypatch):
    base = tiny_base(tmp_path / "base", "llama")
    recipe = write_recipe(tmp_path, base, WIDE)
    lora("train", recipe)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        lora("train", recipe, "--out", tmp_path / "cpu")

    gpu, cpu = ([event["loss"] for event in events(tmp_path / name, "step")] for name in ("out", "cpu"))
    assert gpu == pytest.approx(cpu, rel=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True, 2, "mlp"])
def test_the_memory_of_a_step_is_predicted_within_5_percent(lora, tmp_path, checkpointing):
    base = tiny_base(tmp_path / "base", "llama")
    settings = {"model.dtype": "bfloat16", "training.gradient_checkpointing": checkpointing}
    recipe = write_recipe(tmp_path, base, WIDE | settings)

    lora("train", recipe)

    [memory] = events(tmp_path / "out", "memory")
    workspaces = 64 * 2**20  # cuBLAS's own, which no formula of the model knows
    assert memory["measured_bytes"] == pytest.approx(memory["predicted_bytes"], rel=0.05, abs=workspaces)
