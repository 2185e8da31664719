"""The lean step is the plain one: the same losses and the same gradients, on every architecture."""

import pytest
import torch
from layers import randomize, relative_difference
from tiny import CONFIGS, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from lora_cli.data.collate import collate
from lora_cli.data.types import Example, RowId
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.inject import inject, linears
from lora_cli.lora.targets import choose_targets
from lora_cli.models.load import head_paths
from lora_cli.models.logits import ARCHITECTURES, frozen_head
from lora_cli.models.recompute import checkpoint_activations
from lora_cli.objectives.sft import sft

_SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 4}
OTHERS = {
    "cohere": {**_SIZES, "logit_scale": 0.3},
    "cohere2": {**_SIZES, "logit_scale": 0.3, "head_dim": 8, "sliding_window": 64},
    "granite": {**_SIZES, "logits_scaling": 3.0},
    "olmo2": _SIZES,
    "stablelm": _SIZES,
    "phi": _SIZES,
    "smollm3": _SIZES,
    "qwen3_moe": {**_SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16},
    "gptj": {**_GPT, "bos_token_id": 1, "eos_token_id": 2},
}
# In float64 only the logits are float32, and both ways stand against each other. In float32 each is up to 1e-6 away from
# the gradients in float64, and up to 2e-6 behind norms that divide by what is small here (gemma2, gemma3, olmo2)
AGREE, AGREE_IN_FLOAT32 = 5e-7, 1.5e-6
SOURCES = ["a.jsonl", "b.jsonl"]


def model_of(name: str, **config) -> torch.nn.Module:
    """A tiny model in training with an adapter that has moved."""
    torch.manual_seed(0)
    if name in OTHERS:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **OTHERS[name]))
    else:
        model = tiny_model(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config._experts_implementation = "eager"  # grouped products know no float64
    if getattr(model.config, "final_logit_softcapping", 0) is None:
        model.config.final_logit_softcapping = 3.0  # a cap that bends
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ()} | config
    inject(model, LoRAConfig(**settings), choose_targets("all-linear", list(linears(model)), head=head_paths(model)))
    randomize(model, size=0.05)
    return model.train()


def batch_of(*, packed: bool) -> dict:
    def example(length: int, source: str) -> Example:
        ids = [5 + (7 * i + length) % 300 for i in range(length)]
        return Example(
            ids, [0.0] * (length // 3) + [0.5 + i % 2 for i in range(length - length // 3)], RowId(source, 1)
        )

    rows = [example(12, SOURCES[0]), example(31, SOURCES[1]), example(20, SOURCES[0])]
    return collate([rows[:2], rows[2:]] if packed else [[row] for row in rows], SOURCES)


def step(model: torch.nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Loss, losses by source, and gradients of one forward and backward."""
    torch.manual_seed(3)
    loss = sft(model, batch)
    loss.total.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return loss.total.detach(), *loss.metrics.values(), gradients


def plain_step(model: torch.nn.Module, batch: dict, monkeypatch):
    """The same with every linear and the loss composed by autograd, logits of all labelled positions at once."""
    with monkeypatch.context() as patched:
        patched.setattr("lora_cli.lora.layer.frozen_matrix", lambda _: None)
        patched.setattr("lora_cli.objectives.sft.frozen_head", lambda _: None)
        return step(model, batch)


def check_same(model: torch.nn.Module, batch: dict, monkeypatch) -> None:
    for dtype, agree in ((torch.float32, AGREE_IN_FLOAT32), (torch.float64, AGREE)):
        total, by_source, gradients = step(model.to(dtype), batch)
        of_plain, by_source_of_plain, plain = plain_step(model, batch, monkeypatch)

        assert float(total) == pytest.approx(float(of_plain), rel=AGREE)
        assert by_source.tolist() == pytest.approx(by_source_of_plain.tolist(), rel=AGREE)
        assert gradients.keys() == plain.keys()
        assert max(relative_difference(gradients[name], plain[name]) for name in gradients) <= agree


def test_every_architecture_whose_logits_are_made_in_stretches_is_tried_here():
    tried = {model_of(name).config.model_type for name in [*CONFIGS, *OTHERS]}

    assert tried == set(ARCHITECTURES)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS])
def test_the_lean_step_is_the_plain_one_on_every_architecture(name, packed, monkeypatch):
    model = model_of(name)

    assert frozen_head(model) is not None
    check_same(model, batch_of(packed=packed), monkeypatch)


@pytest.mark.parametrize(
    "config", [{"lora_dropout": 0.3}, {"use_dora": True}, {"use_rslora": True}], ids=["dropout", "dora", "rslora"]
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_lean_step_is_the_plain_one_with_every_kind_of_adapter(name, config, monkeypatch):
    check_same(model_of(name, **config), batch_of(packed=False), monkeypatch)


@pytest.mark.parametrize("recompute", [1, "mlp"])
def test_the_lean_step_is_the_plain_one_where_activations_are_computed_again(recompute, monkeypatch):
    model = model_of("llama", lora_dropout=0.3)
    checkpoint_activations(model, recompute)

    check_same(model, batch_of(packed=True), monkeypatch)


@pytest.mark.parametrize(("name", "config"), [("llama-tied", {"trainable_tokens": (7,)}), ("gptj", {"bias": "all"})])
def test_a_head_whose_output_is_moved_by_what_is_trained_makes_its_own_logits(name, config):
    model = model_of(name, **config)
    batch = batch_of(packed=False)

    found = sft(model, batch).total

    assert frozen_head(model) is None
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    at = batch["labels"] >= 0
    losses = torch.nn.functional.cross_entropy(logits[at], batch["labels"][at], reduction="none")
    torch.testing.assert_close(found, losses @ batch["weights"][at], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("change", ["adapted", "trained"])
def test_a_head_that_is_not_frozen_as_it_is_makes_its_own_logits(change):
    torch.manual_seed(0)
    model = tiny_model("llama")
    if change == "adapted":
        inject(model, LoRAConfig(r=4, lora_alpha=6, target_modules=()), ["lm_head"])
    else:
        inject(
            model, LoRAConfig(r=4, lora_alpha=6, target_modules=()), ["model.layers.0.mlp.up_proj"], whole=["lm_head"]
        )

    _, _, gradients = step(model.train(), batch_of(packed=False))

    assert frozen_head(model) is None
    assert any("lm_head" in name and gradient.any() for name, gradient in gradients.items())
