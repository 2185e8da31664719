"""Biases trained beside the adapter: PEFT's `bias: all` and `lora_only`, on a base whose own stay what they are."""

import pytest
import torch
from adapters import assert_read_by_peft_and_taken_off
from layers import relative_difference
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import tiny_model

from lora_cli.errors import ModelError
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.biases import trained_biases
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.inject import frozen_digest, inject
from lora_cli.lora.peft_format import load_adapter

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[5, 17, 200, 31, 8, 90, 41]])
TARGETS = {"qwen2": "q_proj", "gpt2": "c_attn", "opt": "fc1"}
CASES = [(name, bias) for name in TARGETS for bias in ("lora_only", "all")]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def paths(model, name: str) -> list[str]:
    return [path for path, _ in model.named_modules() if path.endswith(f".{TARGETS[name]}")]


def config(name: str, bias: str, **settings) -> LoRAConfig:
    return LoRAConfig(r=2, lora_alpha=4, target_modules=(TARGETS[name],), bias=bias, **settings)


def with_moved_biases(name: str, bias: str, **settings):
    model = tiny_model(name)
    inject(model, config(name, bias, **settings), paths(model, name))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(("name", "bias"), CASES)
def test_those_are_trained_that_the_recipe_names_and_they_start_at_the_bases(name, bias):
    model = tiny_model(name)
    expected = logits(model)
    own = {path.removesuffix(".bias") for path, _ in model.named_parameters() if path.endswith(".bias")}

    inject(model, config(name, bias), paths(model, name))

    assert set(trained_biases(model)) == (own if bias == "all" else set(paths(model, name)))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}], ids=["plain", "dora"])
@pytest.mark.parametrize(("name", "bias"), CASES)
def test_peft_reads_ours_and_switched_off_the_base_is_as_it_was(name, bias, variant, tmp_path):
    model = with_moved_biases(name, bias, **variant)
    adapter = Adapter.of(model, config(name, bias, **variant))

    assert_read_by_peft_and_taken_off(
        model, adapter, lambda: tiny_model(name), logits, tmp_path, transposed=name == "gpt2"
    )


@pytest.mark.parametrize(("name", "bias"), CASES)
def test_we_read_pefts(name, bias, tmp_path):
    torch.manual_seed(0)
    settings = {"fan_in_fan_out": True} if name == "gpt2" else {}
    peft_config = LoraConfig(
        r=2, lora_alpha=4, target_modules=[TARGETS[name]], bias=bias, init_lora_weights=False, **settings
    )
    model = get_peft_model(tiny_model(name), peft_config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(".bias") and parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    expected = logits(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)

    ours = tiny_model(name)
    load_adapter(tmp_path).inject_into(ours)

    assert relative_difference(logits(ours), expected) <= 2e-6


def test_we_read_the_biases_that_peft_saves_once_more_beside_modules_trained_whole(tmp_path):
    """As `norm.modules_to_save.bias` and `norm.original_module.bias`, where all biases are trained."""
    torch.manual_seed(0)
    settings = {"target_modules": ["fc1"], "modules_to_save": ["final_layer_norm"], "init_lora_weights": False}
    model = get_peft_model(tiny_model("opt"), LoraConfig(r=2, lora_alpha=4, bias="all", **settings))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn(parameter.shape))
    expected = logits(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert any("original_module.bias" in name for name in load_file(tmp_path / "adapter_model.safetensors"))

    ours = tiny_model("opt")
    load_adapter(tmp_path).inject_into(ours)

    assert relative_difference(logits(ours), expected) <= 2e-6


def test_the_frozen_biases_stay_frozen_and_the_trained_ones_get_gradients():
    model = with_moved_biases("opt", "all")
    before = frozen_digest(model)

    model(input_ids=IDS).logits.square().sum().backward()

    assert all(trained.bias.grad is not None and trained.bias.grad.any() for trained in trained_biases(model).values())
    assert frozen_digest(model) == before
    assert all(p.grad is None for name, p in model.named_parameters() if not p.requires_grad)


def test_where_there_is_no_bias_it_is_said():
    model = tiny_model("llama")

    for bias, who in (("lora_only", "the adapted modules have"), ("all", "this model has")):
        with pytest.raises(ModelError, match=f"`lora.bias: {bias}`: {who} no bias"):
            inject(
                model,
                LoRAConfig(r=2, lora_alpha=4, target_modules=("q_proj",), bias=bias),
                ["model.layers.0.self_attn.q_proj"],
            )


def test_an_adapter_that_lacks_a_bias_it_speaks_of_is_refused_and_the_base_is_left_alone():
    adapter = Adapter.of(with_moved_biases("qwen2", "lora_only"), config("qwen2", "lora_only"))
    first = min(adapter.extras)
    adapter.extras.pop(first)
    model = tiny_model("qwen2")

    with pytest.raises(ModelError, match=f"it says `bias: lora_only`, and that of {first} is not in it"):
        adapter.inject_into(model)

    assert not trained_biases(model)
