"""The peak of a step by formula is the peak that is measured, on every architecture and for every way to checkpoint."""

import pytest
import torch
from budget.steps import peak_bytes, tiny_step
from tiny import CONFIGS, EXPERTS
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lora_cli.budget.activations import How
from lora_cli.budget.bases import measure_base
from lora_cli.budget.memory import base_bytes
from lora_cli.budget.params import adapted_linears
from lora_cli.budget.quantised import QUANTIZE
from lora_cli.budget.step import Batch, Setup, step_memory
from lora_cli.kernels import products
from lora_cli.lora.config import LoRAConfig

NAMES = [*(name for name in CONFIGS if name != "llama-tied"), "qwen3_moe"]


@pytest.mark.parametrize("recompute", [0, 1, 2, "mlp"])
@pytest.mark.parametrize("name", NAMES)
def test_the_predicted_peak_is_the_measured_one_within_5_percent(name, recompute):
    if (name, recompute) == ("opt", "mlp"):
        pytest.skip("its blocks have no module for the MLP")
    step = tiny_step(name, packed=True, recompute=recompute)

    predicted = step_memory(step.setup, step.batch, recompute).total

    assert predicted == pytest.approx(peak_bytes(step), rel=0.05)


@pytest.mark.parametrize("hardware", [True, False], ids=["bf16 hardware", "widened"])
@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_in_16_bits_it_is_too_with_instructions_for_them_or_without(name, recompute, hardware, monkeypatch):
    monkeypatch.setattr(products, "_cpu_has_bfloat16", lambda: hardware)
    step = tiny_step(name, dtype=torch.bfloat16, packed=True, recompute=recompute)

    predicted = step_memory(step.setup, step.batch, recompute).total

    assert predicted == pytest.approx(peak_bytes(step), rel=0.05)
    assert step.setup.how.widened != hardware


@pytest.mark.parametrize("hardware", [True, False], ids=["bf16 hardware", "widened"])
def test_the_head_and_the_weights_are_widened_one_at_a_time(hardware, monkeypatch):
    """With weights that are large beside the batch, as those of real models are."""
    monkeypatch.setattr(products, "_cpu_has_bfloat16", lambda: hardware)
    large = {"hidden_size": 128, "intermediate_size": 400, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=3000, num_hidden_layers=2, **large)).to(torch.bfloat16)
    step = tiny_step(model, dtype=torch.bfloat16, packed=True)

    assert step_memory(step.setup, step.batch, 0).total == pytest.approx(peak_bytes(step), rel=0.05)


MIXTURES = [
    {"num_experts_per_tok": 4, "intermediate_size": 24},  # what leaves the experts is most
    {"num_experts_per_tok": 3, "intermediate_size": 256},  # what is inside of them is
    {"num_experts_per_tok": 2, "intermediate_size": 64, "num_hidden_layers": 4},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", [0, 1, "mlp"])
@pytest.mark.parametrize("sizes", MIXTURES, ids=str)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_of_all_proportions_are_counted_as_many_times_as_a_token_meets_some(name, sizes, recompute, dtype):
    config = (CONFIGS | EXPERTS)[name]()
    config.update(
        sizes | {"num_local_experts": 8, "num_experts": 8, "moe_intermediate_size": sizes["intermediate_size"]}
    )
    torch.manual_seed(0)
    step = tiny_step(
        AutoModelForCausalLM.from_config(config, dtype=dtype), packed=True, recompute=recompute, dtype=dtype
    )

    predicted = step_memory(step.setup, step.batch, recompute).total

    assert predicted == pytest.approx(peak_bytes(step), rel=0.05)


BESIDE = [
    ("llama", {"trainable_tokens": (3, 7)}),
    ("llama-tied", {"trainable_tokens": (3, 7)}),
    ("gpt2", {"trainable_tokens": (3,), "targets": "d"}),
    ("gpt2", {"bias": "all"}),
    ("gpt2", {"bias": "all", "targets": "d"}),
    ("gpt_neox", {"bias": "all"}),
    ("qwen2", {"bias": "all", "targets": "d"}),
    ("qwen2", {"bias": "lora_only"}),
]


@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize(("name", "options"), BESIDE, ids=str)
def test_biases_and_rows_of_tokens_are_counted_as_what_is_trained_and_as_what_they_keep(name, options, recompute):
    step = tiny_step(name, packed=True, recompute=recompute, **options)

    assert step.setup.trained == sum(p.numel() for p in step.trained)
    assert step_memory(step.setup, step.batch, recompute).total == pytest.approx(peak_bytes(step), rel=0.05)


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_quantised_weights_are_counted_as_they_are_stored(quantize):
    shape = measure_base("SmolLM2-135M").shape
    inside = sum(linear.weights for linear in shape.linears if linear.path not in shape.head)
    bits = {"int8": 8, "nf4": 4}[quantize]

    found = base_bytes(shape, QUANTIZE[quantize]) - 2 * (shape.parameters - inside)

    assert inside * bits / 8 < found < 1.05 * inside * bits / 8


def test_checkpointing_more_keeps_less():
    step = tiny_step("llama")

    kept = [step_memory(step.setup, step.batch, mode).activations for mode in (0, 2, 1)]

    assert kept == sorted(set(kept), reverse=True)


@pytest.mark.parametrize(("name", "rows", "gib"), [("Llama-3.1-8B", 4, 31.4), ("Llama-3.2-1B", 8, 31.1)])
def test_the_formula_explains_what_was_measured_on_an_h100(name, rows, gib):
    """A PEFT loop, every block checkpointed, rows of 2,048; unlike our step it makes all logits, and holds them to the end."""
    shape = measure_base(name).shape
    lora = LoRAConfig(r=16, lora_alpha=16, target_modules=())
    setup = Setup(shape, tuple(adapted_linears(shape, "all-linear")), lora, How(logits_at_once=None))
    batch = Batch(rows, 2048, rows * 2048)

    logits_in_16_bits = 2 * shape.vocabulary * batch.trained
    predicted = step_memory(setup, batch, 1).total + logits_in_16_bits

    assert predicted / 2**30 == pytest.approx(gib, rel=0.01)
