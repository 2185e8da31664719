"""The law of the budget: what the formulas say of a config is what transformers builds from it."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lora_cli.budget.defaults import ALIASES, DEFAULTS
from lora_cli.budget.params import adapted_linears, budget_of
from lora_cli.budget.shapes import ARCHITECTURES, ENCODERS, shape_of
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.inject import inject, linears
from lora_cli.lora.targets import choose_targets
from lora_cli.lora.weights import storage_of
from lora_cli.models.load import head_paths

# odd on purpose: head_dim · heads ≠ hidden, one or two key-value heads, no width equal to another
SIZES = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE_HEADS = {**SIZES, "head_dim": 10}
ONE_KEY = {**WIDE_HEADS, "num_key_value_heads": 1}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
BIASED = {"attention_bias": True}
MLP_BIASED = {"mlp_bias": True}
GPT = {"vocab_size": 53, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 19, "rotary_dim": 2, "eos_token_id": 2}
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
QWEN3_MOE = {**ONE_KEY, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 14}
OPT = {**SIZES, "ffn_dim": 44, "max_position_embeddings": 19, "word_embed_proj_dim": 24}
FALCON = {**SIZES, "num_kv_heads": 2}
ENCODER = {**SIZES, "max_position_embeddings": 19, "type_vocab_size": 3}

CASES = {
    "llama": [SIZES, ONE_KEY | TIED, WIDE_HEADS | BIASED | MLP_BIASED],
    "mistral": [SIZES, ONE_KEY | TIED],
    "mixtral": [SIZES | EXPERTS, ONE_KEY | EXPERTS | TIED],
    "qwen2": [SIZES, WIDE_HEADS | TIED],
    "qwen3": [SIZES, ONE_KEY | BIASED, WIDE_HEADS | TIED],
    "qwen3_moe": [
        QWEN3_MOE,
        QWEN3_MOE | {"decoder_sparse_step": 2} | TIED,
        QWEN3_MOE | {"mlp_only_layers": [1]} | BIASED,
    ],
    "gemma": [WIDE_HEADS, ONE_KEY | UNTIED | BIASED],
    "gemma2": [WIDE_HEADS, ONE_KEY | UNTIED | BIASED],
    "gemma3_text": [WIDE_HEADS, ONE_KEY | UNTIED | BIASED],
    "smollm3": [SIZES, WIDE_HEADS | UNTIED | BIASED | MLP_BIASED],
    "granite": [SIZES, WIDE_HEADS | TIED | BIASED | MLP_BIASED],
    "olmo2": [SIZES, WIDE_HEADS | TIED | BIASED],
    "stablelm": [
        SIZES,
        SIZES | {"use_qkv_bias": True, "use_parallel_residual": True},
        SIZES | {"qk_layernorm": True} | TIED,
    ],
    "phi": [SIZES, SIZES | {"qk_layernorm": True}, SIZES | {"num_key_value_heads": None} | TIED],
    "phi3": [SIZES, WIDE_HEADS | TIED],
    "gpt2": [GPT, GPT | {"n_inner": 44}, GPT | UNTIED],
    "gptj": [GPT, GPT | {"n_inner": 44}, GPT | TIED],
    "gpt_neox": [SIZES, SIZES | {"attention_bias": False} | TIED],
    "opt": [
        OPT,
        OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
        OPT | {"enable_bias": False} | UNTIED,
        OPT | {"layer_norm_elementwise_affine": False},
    ],
    "falcon": [
        FALCON,
        FALCON | {"multi_query": False, "bias": True},
        FALCON | {"parallel_attn": False} | UNTIED,
        FALCON | {"new_decoder_architecture": True},
        FALCON | {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
        FALCON | {"ffn_hidden_size": 44},
    ],
    "bert": [ENCODER],
    "roberta": [ENCODER],
}


def build(model_type: str, options: dict) -> tuple[nn.Module, dict]:
    """A model without memory (meta device), and its config as config.json holds it: without the defaults."""
    config = AutoConfig.for_model(model_type, **options)
    auto = AutoModel if model_type in ENCODERS else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config), json.loads(config.to_json_string())


def test_every_architecture_of_transformers_is_held_to_the_law():
    assert set(CASES) == set(ARCHITECTURES) - {"gpt3"}


@pytest.mark.parametrize(("model_type", "options"), [(t, options) for t in CASES for options in CASES[t]])
def test_a_config_tells_every_parameter_and_every_linear_layer(model_type, options):
    model, config = build(model_type, options)
    real = {path: storage_of(module).shape(module)[::-1] for path, module in linears(model).items()}

    shape = shape_of(config)

    assert {linear.path: (linear.in_features, linear.out_features) for linear in shape.linears} == real
    assert [linear.path for linear in shape.linears] == list(real)
    assert set(shape.head) == head_paths(model)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("model_type", CASES)
def test_the_adapter_by_formula_is_the_adapter_on_the_real_modules(model_type):
    model, config = build(model_type, CASES[model_type][-1])
    real = linears(model)

    for targets in ("all-linear", *letters_of(model_type)):
        chosen = choose_targets(targets, list(real), head=head_paths(model))
        expected = sum(5 * sum(storage_of(real[path]).shape(real[path])) for path in chosen)
        lora = LoRAConfig(r=5, lora_alpha=5, target_modules=())

        budget = budget_of(adapted_linears(shape_of(config), targets), 0, lora)

        assert budget.trainable == expected
        assert sum(row.count for row in budget.rows) == len(chosen)


def letters_of(model_type: str) -> tuple[str, ...]:
    if model_type in ("mixtral", "qwen3_moe"):  # experts are no linear layers
        return ("qv", "qkvo")
    return ("qv", "qkvo", "d", "ud")


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_budget_counts_what_injection_makes_trainable(use_dora):
    options = WIDE_HEADS | BIASED
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **options))
    shape = shape_of({"model_type": "qwen3", **options})
    lora = LoRAConfig(
        r=3, lora_alpha=6, target_modules=(), use_dora=use_dora, rank_pattern={"1.self_attn.q_proj": 5, "v_proj": 2}
    )
    adapted = adapted_linears(shape, "qvd", layers=[1, 2])
    base = sum(parameter.numel() for parameter in model.parameters())

    inject(model, lora, [linear.path for linear in adapted])
    budget = budget_of(adapted, shape.parameters, lora)

    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert budget.trainable == trainable
    assert budget.total == base + trainable


def test_a_composite_model_is_measured_by_its_language_model():
    config = AutoConfig.for_model("gemma3", text_config=ONE_KEY)
    with torch.device("meta"):
        text = AutoModelForCausalLM.from_config(config.text_config)

    shape = shape_of(json.loads(config.to_json_string()))

    assert shape.parameters == sum(parameter.numel() for parameter in text.parameters())
    assert shape.notes == ("the language model alone: the vision or audio tower is not counted",)


@pytest.mark.parametrize("model_type", CASES)
def test_what_a_config_leaves_out_is_transformers_default(model_type):
    theirs = AutoConfig.for_model(model_type)

    for key, value in DEFAULTS[model_type].items():
        derived = {"num_key_value_heads": "num_attention_heads", "word_embed_proj_dim": "hidden_size"}
        expected = DEFAULTS[model_type][derived[key]] if value is None and key in derived else value
        assert getattr(theirs, key, expected) == expected, key


@pytest.mark.parametrize("model_type", sorted(set(ALIASES) - {"gpt3"}))
def test_a_key_may_have_either_of_transformers_names(model_type):
    theirs = AutoConfig.for_model(model_type)

    for alias, key in ALIASES[model_type].items():
        assert theirs.attribute_map[alias] == key
