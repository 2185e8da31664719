"""What a config.json may leave out or spell differently: the defaults and aliases of transformers' own classes."""

from collections.abc import Mapping
from typing import Any


def sizes(
    vocab: int, hidden: int, inner: int, layers: int, heads: int, kv: int | None = None, **more: Any
) -> dict[str, Any]:
    """A config under the key names most architectures share."""
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        **more,
    }


def gpt_sizes(vocab: int, hidden: int, layers: int, heads: int, positions: int, **more: Any) -> dict[str, Any]:
    """A config under GPT-2's key names."""
    return {
        "vocab_size": vocab,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": positions,
        **more,
    }


_GPT_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
ALIASES: dict[str, Mapping[str, str]] = {
    "gpt2": _GPT_NAMES,
    "gptj": _GPT_NAMES,
    "gpt3": _GPT_NAMES,
    "mixtral": {"num_experts": "num_local_experts"},
    "qwen3_moe": {"num_experts": "num_local_experts"},
}

_UNTIED = {"tie_word_embeddings": False}
_TIED = {"tie_word_embeddings": True}
_NO_BIAS = {"attention_bias": False, "mlp_bias": False}
_QWEN3_MOE = {
    "moe_intermediate_size": 768,
    "num_local_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "attention_bias": False,
}
_STABLELM = {"use_qkv_bias": False, "qk_layernorm": False, "use_parallel_residual": False}
_OPT = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "ffn_dim": 3072,
    "num_hidden_layers": 12,
    "word_embed_proj_dim": None,
    "max_position_embeddings": 2048,
    "enable_bias": True,
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "layer_norm_elementwise_affine": True,
}
_FALCON = {
    "vocab_size": 65024,
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "bias": False,
    "new_decoder_architecture": False,
    "multi_query": True,
    "parallel_attn": True,
}
_POSITIONS = {"max_position_embeddings": 512, "type_vocab_size": 2}

DEFAULTS: dict[str, Mapping[str, Any]] = {
    "llama": sizes(32000, 4096, 11008, 32, 32, **_NO_BIAS, **_UNTIED),
    "mistral": sizes(32000, 4096, 14336, 32, 32, 8, **_UNTIED),
    "mixtral": sizes(32000, 4096, 14336, 32, 32, 8, num_local_experts=8, num_experts_per_tok=2, **_UNTIED),
    "qwen2": sizes(151936, 4096, 22016, 32, 32, 32, **_UNTIED),
    "qwen3": sizes(151936, 4096, 22016, 32, 32, 32, head_dim=128, attention_bias=False, **_UNTIED),
    "qwen3_moe": sizes(151936, 2048, 6144, 24, 32, 4, **_QWEN3_MOE, **_UNTIED),
    "gemma": sizes(256000, 3072, 24576, 28, 16, 16, head_dim=256, attention_bias=False, **_TIED),
    "gemma2": sizes(256000, 2304, 9216, 26, 8, 4, head_dim=256, attention_bias=False, **_TIED),
    "gemma3_text": sizes(262208, 2304, 9216, 26, 8, 4, head_dim=256, attention_bias=False, **_TIED),
    "smollm3": sizes(128256, 2048, 11008, 36, 16, 4, **_NO_BIAS, **_TIED),
    "granite": sizes(32000, 4096, 11008, 32, 32, **_NO_BIAS, **_UNTIED),
    "olmo2": sizes(50304, 4096, 11008, 32, 32, attention_bias=False, **_UNTIED),
    "stablelm": sizes(50304, 2560, 6912, 32, 32, 32, **_STABLELM, **_UNTIED),
    "phi": sizes(51200, 2048, 8192, 24, 32, qk_layernorm=False, **_UNTIED),
    "phi3": sizes(32064, 3072, 8192, 32, 32, **_UNTIED),
    "gpt2": gpt_sizes(50257, 768, 12, 12, 1024, **_TIED),
    "gptj": gpt_sizes(50400, 4096, 28, 16, 2048, **_UNTIED),
    "gpt_neox": sizes(50432, 6144, 24576, 44, 64, attention_bias=True, **_UNTIED),
    "opt": {**_OPT, **_TIED},
    "falcon": {**_FALCON, **_TIED},
    "bert": sizes(30522, 768, 3072, 12, 12, **_POSITIONS),
    "roberta": sizes(50265, 768, 3072, 12, 12, **_POSITIONS),
    "gpt3": gpt_sizes(50257, 12288, 96, 96, 2048, **_TIED),
}
