"""mlx-lm itself, with an adapter that `lora export --to mlx` wrote, held against base + adapter (`make test-mlx`)."""

import pytest
import tiny
import torch
from adapters import ROWS, logits_of, write_random
from tiny import tiny_base

from lora_cli.lora.peft_format import load_adapter

# What each kind needs to be read by mlx-lm at all
KINDS = {
    "llama": {},
    "llama-tied": {},
    "mistral": {},
    "qwen2": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}
    },  # it takes the family's own, whatever is said
    "qwen3": {},
    "phi3": {},
    "gemma2": {},
    "gemma3": {"num_hidden_layers": 6, "layer_types": None},  # it looks for a global block among six
}
TWISTS = {"rank_pattern": {r".*\.1\..*": 3}, "alpha_pattern": {".*mlp.*": 5}, "use_rslora": True, "size": 0.1}


def log_probs(base, adapter=None) -> list[torch.Tensor]:
    """[time, vocabulary] for each row, in float32."""
    import mlx.core as mx
    from mlx_lm.utils import load

    model, _ = load(str(base), adapter_path=adapter and str(adapter))
    logits = [model(mx.array([row]))[0].astype(mx.float32) for row in ROWS]
    return [torch.tensor((each - mx.logsumexp(each, axis=-1, keepdims=True)).tolist()) for each in logits]


ADAPTERS = {
    "DoRA": {"use_dora": True},
    "DoRA on some blocks": {"use_dora": True, "targets": "qd", "layers": [1]},
    "embedding and head": {"targets": ["embed_tokens", "lm_head", "v_proj"]},
}


@pytest.mark.parametrize("name", KINDS)
def test_mlx_lm_answers_as_base_and_adapter(name, lora, tmp_path, monkeypatch):
    pytest.importorskip("mlx_lm", reason="needs mlx-lm")
    made = tiny.CONFIGS[name]
    monkeypatch.setitem(tiny.CONFIGS, name, lambda: type(made())(**made().to_dict() | KINDS[name]))
    base = tiny_base(tmp_path / "base", name)
    assert_mlx_lm_answers_alike(base, TWISTS, lora, tmp_path)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_mlx_lm_answers_as_other_adapters_do(kind, lora, tmp_path):
    pytest.importorskip("mlx_lm", reason="needs mlx-lm")
    assert_mlx_lm_answers_alike(tiny_base(tmp_path / "base"), TWISTS | ADAPTERS[kind], lora, tmp_path)


def assert_mlx_lm_answers_alike(base, settings, lora, tmp_path) -> None:
    adapter = write_random(tmp_path / "adapter", base, **settings)

    lora("export", "--adapter", adapter, "--to", "mlx", "--out", tmp_path / "mlx")

    expected = [row.log_softmax(-1) for row in logits_of(base, load_adapter(adapter))]
    found, alone = log_probs(base, tmp_path / "mlx"), log_probs(base)
    for one, other, bare in zip(found, expected, alone, strict=True):
        assert (one - other).abs().max() < 1e-4
        assert (one - bare).abs().max() > 0.02
