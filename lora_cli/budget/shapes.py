"""A model's linear layers and parameter count from its config.json alone: no torch, no weights.

Paths, order and shapes are those of the modules transformers builds, so that targets chosen here are the targets
chosen there. What is no linear layer (embeddings, norms, routers, experts) is counted in one number.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lora_cli.budget.defaults import ALIASES, DEFAULTS
from lora_cli.errors import ModelError, Problem

Config = Mapping[str, Any]
Flag = bool | str  # a fixed property of the architecture, or the config key that decides it


@dataclass(frozen=True)
class Linear:
    """One linear layer, whichever way its weight is stored. A `tied` weight belongs to the embeddings."""

    path: str
    in_features: int
    out_features: int
    bias: bool = False
    tied: bool = False
    copies: int = 1  # how many such matrices the weight is: one for each expert

    @property
    def weights(self) -> int:
        return 0 if self.tied else self.in_features * self.out_features * self.copies

    @property
    def parameters(self) -> int:
        return self.weights + self.bias * self.out_features


@dataclass(frozen=True)
class ModelShape:
    """A base in numbers: its linear layers in the model's order, and how many parameters stand outside of them."""

    model_type: str
    linears: tuple[Linear, ...]
    head: tuple[str, ...]  # paths of output projections, which letters and all-linear leave out
    other_parameters: int
    config: Config  # under the architecture's own names, complete
    notes: tuple[str, ...] = ()
    # Embeddings, convolutions and experts, which a name in `lora.targets` reaches: known where the modules are built, and
    # counted among the others
    by_name: tuple[Linear, ...] = ()

    @property
    def hidden(self) -> int:
        return self.config.get("hidden_size") or self.config["n_embd"]

    @property
    def blocks(self) -> int:
        return self.config.get("num_hidden_layers") or self.config["n_layer"]

    @property
    def vocabulary(self) -> int:
        return self.config["vocab_size"]

    @property
    def parameters(self) -> int:
        """Unique parameters of the base: a tied weight once."""
        return self.other_parameters + sum(linear.parameters for linear in self.linears)


@dataclass(frozen=True)
class Block:
    """One layer of the stack: its linears by path inside the block, and its other parameters."""

    linears: Sequence[Linear]
    others: int


def shape_of(config: Config, *, where: str = "") -> ModelShape:
    """The shape of the model a config.json describes; of a model with a `text_config`, its language model alone.

    Raises ModelError, naming `where` the config stands, for an architecture without a formula.
    """
    text = config.get("text_config")
    model_type = str((text or config).get("model_type") or config.get("model_type"))
    model_type = TEXT_PARTS.get(model_type, model_type) if text else model_type
    if model_type not in ARCHITECTURES:
        what, known = f"`model_type: {model_type}` has no parameter formula here", ", ".join(ARCHITECTURES)
        raise ModelError(Problem(what, where=where, fix=f"known types: {known}"))
    c = _complete(model_type, text or config)
    if c.get("add_cross_attention"):
        raise ModelError(Problem("`add_cross_attention` has no parameter formula here", where=where))
    linears, others = ARCHITECTURES[model_type](c)
    head = tuple(linear.path for linear in linears if linear.path == HEAD)
    return ModelShape(model_type, tuple(linears), head, others, c, tuple(_notes(c, text is not None, model_type)))


def _complete(model_type: str, config: Config) -> Config:
    """The config under its architecture's own key names, with transformers' defaults for what it leaves out."""
    aliases = ALIASES.get(model_type, {})
    return {**DEFAULTS[model_type], **{aliases.get(key, key): value for key, value in config.items()}}


def _notes(c: Config, is_text_part: bool, model_type: str) -> Iterable[str]:
    if is_text_part:
        yield "the language model alone: the vision or audio tower is not counted"
    if c.get("num_local_experts"):
        yield "experts are three-dimensional parameters: counted in the base, no target, and left in 16 bits by nf4"
    if model_type in ENCODERS:
        yield "the encoder with its pooler, without a task head"


HEAD = "lm_head"
Parts = tuple[list[Linear], int]  # every linear of a model, and the number of its other parameters


def _stack(path: str, blocks: Iterable[Block]) -> Parts:
    linears, others = [], 0
    for i, block in enumerate(blocks):
        linears += [
            Linear(f"{path}.{i}.{linear.path}", linear.in_features, linear.out_features, linear.bias)
            for linear in block.linears
        ]
        others += block.others
    return linears, others


def _head(c: Config, width: int, *, bias: bool = False) -> Linear:
    return Linear(HEAD, width, c["vocab_size"], bias=bias, tied=c["tie_word_embeddings"])


def _is(c: Config, flag: Flag) -> bool:
    return bool(c[flag]) if isinstance(flag, str) else flag


def widths(c: Config) -> tuple[int, int, int]:
    """(head, queries, keys): the width of one head, of all query heads, of all key (or value) heads."""
    heads = c["num_attention_heads"]
    head = c.get("head_dim") or c["hidden_size"] // heads
    return head, heads * head, (c.get("num_key_value_heads") or heads) * head


def _layer_norm(width: int) -> int:
    return 2 * width  # weight and bias


def _llama(
    c: Config,
    *,
    qkv_bias: Flag = False,
    o_bias: Flag = False,
    mlp_bias: Flag = False,
    norms: int = 2,
    head_norm: bool = False,
    width_norm: bool = False,
    experts: Callable[[Config, int], int] | None = None,
) -> Parts:
    """Llama and its many relatives: q, k, v, o and a gated MLP, RMSNorm, no positions to learn.

    `head_norm` is a q_norm and k_norm of one head's width, `width_norm` of all heads'; `experts` gives the parameters
    of a mixture of experts in a layer, 0 where that layer has an ordinary MLP.
    """
    hidden, (head, queries, keys) = c["hidden_size"], widths(c)
    attention = [
        Linear("self_attn.q_proj", hidden, queries, _is(c, qkv_bias)),
        Linear("self_attn.k_proj", hidden, keys, _is(c, qkv_bias)),
        Linear("self_attn.v_proj", hidden, keys, _is(c, qkv_bias)),
        Linear("self_attn.o_proj", queries, hidden, _is(c, o_bias)),
    ]
    mlp = _gated_mlp(c, _is(c, mlp_bias))
    norm = norms * hidden + head_norm * 2 * head + width_norm * (queries + keys)

    def block(i: int) -> Block:
        mixture = experts(c, i) if experts else 0
        return Block(attention if mixture else attention + mlp, norm + mixture)

    linears, others = _stack("model.layers", map(block, range(c["num_hidden_layers"])))
    return [*linears, _head(c, hidden)], others + c["vocab_size"] * hidden + hidden


def _gated_mlp(c: Config, bias: bool = False) -> list[Linear]:
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    return [
        Linear("mlp.gate_proj", hidden, inner, bias),
        Linear("mlp.up_proj", hidden, inner, bias),
        Linear("mlp.down_proj", inner, hidden, bias),
    ]


def _mixtral_experts(c: Config, layer: int) -> int:
    return _mixture(c, c["intermediate_size"])


def _qwen3_experts(c: Config, layer: int) -> int:
    dense = layer in (c.get("mlp_only_layers") or ()) or (layer + 1) % c["decoder_sparse_step"]
    return 0 if dense else _mixture(c, c["moe_intermediate_size"])


def _mixture(c: Config, inner: int) -> int:
    """The router, and gate, up and down of every expert."""
    return c["num_local_experts"] * (c["hidden_size"] + 3 * c["hidden_size"] * inner)


def _stablelm(c: Config) -> Parts:
    hidden, (_, queries, keys) = c["hidden_size"], widths(c)
    bias = c["use_qkv_bias"]
    linears = [
        Linear("self_attn.q_proj", hidden, queries, bias),
        Linear("self_attn.k_proj", hidden, keys, bias),
        Linear("self_attn.v_proj", hidden, keys, bias),
        Linear("self_attn.o_proj", hidden, hidden),
        *_gated_mlp(c),
    ]
    norms = (1 if c["use_parallel_residual"] else 2) * _layer_norm(hidden) + c["qk_layernorm"] * (queries + keys)
    linears, others = _stack("model.layers", [Block(linears, norms)] * c["num_hidden_layers"])
    return [*linears, _head(c, hidden)], others + c["vocab_size"] * hidden + _layer_norm(hidden)


def _phi(c: Config) -> Parts:
    hidden, (head, queries, keys), inner = c["hidden_size"], widths(c), c["intermediate_size"]
    linears = [
        Linear("self_attn.q_proj", hidden, queries, True),
        Linear("self_attn.k_proj", hidden, keys, True),
        Linear("self_attn.v_proj", hidden, keys, True),
        Linear("self_attn.dense", queries, hidden, True),
        Linear("mlp.fc1", hidden, inner, True),
        Linear("mlp.fc2", inner, hidden, True),
    ]
    norms = _layer_norm(hidden) + c["qk_layernorm"] * 2 * _layer_norm(head)
    linears, others = _stack("model.layers", [Block(linears, norms)] * c["num_hidden_layers"])
    return [*linears, _head(c, hidden, bias=True)], others + c["vocab_size"] * hidden + _layer_norm(hidden)


def _phi3(c: Config) -> Parts:
    hidden, (_, queries, keys), inner = c["hidden_size"], widths(c), c["intermediate_size"]
    linears = [
        Linear("self_attn.o_proj", queries, hidden),
        Linear("self_attn.qkv_proj", hidden, queries + 2 * keys),
        Linear("mlp.gate_up_proj", hidden, 2 * inner),
        Linear("mlp.down_proj", inner, hidden),
    ]
    linears, others = _stack("model.layers", [Block(linears, 2 * hidden)] * c["num_hidden_layers"])
    return [*linears, _head(c, hidden)], others + c["vocab_size"] * hidden + hidden


def _gpt2(c: Config, *, fused: bool = True) -> Parts:
    hidden, inner = c["n_embd"], c.get("n_inner") or 4 * c["n_embd"]
    queries = [Linear("attn.c_attn", hidden, 3 * hidden, True)] if fused else _separate_projections(hidden)
    linears = [
        *queries,
        Linear("attn.c_proj", hidden, hidden, True),
        Linear("mlp.c_fc", hidden, inner, True),
        Linear("mlp.c_proj", inner, hidden, True),
    ]
    linears, others = _stack("transformer.h", [Block(linears, 2 * _layer_norm(hidden))] * c["n_layer"])
    embeddings = (c["vocab_size"] + c["n_positions"]) * hidden
    return [*linears, _head(c, hidden)], others + embeddings + _layer_norm(hidden)


def _separate_projections(hidden: int) -> list[Linear]:
    return [Linear(f"attn.{name}", hidden, hidden, True) for name in ("q_proj", "k_proj", "v_proj")]


def _gptj(c: Config) -> Parts:
    hidden, inner = c["n_embd"], c.get("n_inner") or 4 * c["n_embd"]
    linears = [
        *(Linear(f"attn.{name}", hidden, hidden) for name in ("k_proj", "v_proj", "q_proj", "out_proj")),
        Linear("mlp.fc_in", hidden, inner, True),
        Linear("mlp.fc_out", inner, hidden, True),
    ]
    linears, others = _stack("transformer.h", [Block(linears, _layer_norm(hidden))] * c["n_layer"])
    return [*linears, _head(c, hidden, bias=True)], others + c["vocab_size"] * hidden + _layer_norm(hidden)


def _gpt_neox(c: Config) -> Parts:
    hidden, inner, bias = c["hidden_size"], c["intermediate_size"], c["attention_bias"]
    linears = [
        Linear("attention.query_key_value", hidden, 3 * hidden, bias),
        Linear("attention.dense", hidden, hidden, bias),
        Linear("mlp.dense_h_to_4h", hidden, inner, True),
        Linear("mlp.dense_4h_to_h", inner, hidden, True),
    ]
    linears, others = _stack("gpt_neox.layers", [Block(linears, 2 * _layer_norm(hidden))] * c["num_hidden_layers"])
    return [*linears, _head(c, hidden)], others + c["vocab_size"] * hidden + _layer_norm(hidden)


def _opt(c: Config) -> Parts:
    hidden, inner, bias = c["hidden_size"], c["ffn_dim"], c["enable_bias"]
    narrow = c["word_embed_proj_dim"] or hidden
    norm = _layer_norm(hidden) if c["layer_norm_elementwise_affine"] else 0
    linears = [
        *(Linear(f"self_attn.{name}", hidden, hidden, bias) for name in ("k_proj", "v_proj", "q_proj", "out_proj")),
        Linear("fc1", hidden, inner, bias),
        Linear("fc2", inner, hidden, bias),
    ]
    linears, others = _stack("model.decoder.layers", [Block(linears, 2 * norm)] * c["num_hidden_layers"])
    if narrow != hidden:
        out, into = "model.decoder.project_out", "model.decoder.project_in"
        linears = [Linear(out, hidden, narrow), Linear(into, narrow, hidden), *linears]
    last_norm = norm if c["do_layer_norm_before"] and not c["_remove_final_layer_norm"] else 0
    # OPT's table of positions starts at 2
    embeddings = c["vocab_size"] * narrow + (c["max_position_embeddings"] + 2) * hidden
    return [*linears, _head(c, narrow)], others + embeddings + last_norm


def _falcon(c: Config) -> Parts:
    hidden, heads, bias = c["hidden_size"], c["num_attention_heads"], c["bias"]
    inner, head = c.get("ffn_hidden_size") or 4 * hidden, hidden // heads
    if c["new_decoder_architecture"]:
        keys = (c.get("num_kv_heads") or heads) * head
    else:
        keys = head if c["multi_query"] else hidden
    linears = [
        Linear("self_attention.query_key_value", hidden, hidden + 2 * keys, bias),
        Linear("self_attention.dense", hidden, hidden, bias),
        Linear("mlp.dense_h_to_4h", hidden, inner, bias),
        Linear("mlp.dense_4h_to_h", inner, hidden, bias),
    ]
    norms = falcon_norms(c) * _layer_norm(hidden)
    linears, others = _stack("transformer.h", [Block(linears, norms)] * c["num_hidden_layers"])
    return [*linears, _head(c, hidden)], others + c["vocab_size"] * hidden + _layer_norm(hidden)


def falcon_norms(c: Config) -> int:
    if not c["parallel_attn"]:
        return 2
    stated = c.get("num_ln_in_parallel_attn")
    return 2 if stated == 2 or (stated is None and c["new_decoder_architecture"]) else 1


def _bert(c: Config) -> Parts:
    """The encoder with its pooler: what a classifier stands on."""
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    linears = [
        *(Linear(f"attention.self.{name}", hidden, hidden, True) for name in ("query", "key", "value")),
        Linear("attention.output.dense", hidden, hidden, True),
        Linear("intermediate.dense", hidden, inner, True),
        Linear("output.dense", inner, hidden, True),
    ]
    linears, others = _stack("encoder.layer", [Block(linears, 2 * _layer_norm(hidden))] * c["num_hidden_layers"])
    embeddings = (c["vocab_size"] + c["max_position_embeddings"] + c["type_vocab_size"]) * hidden
    return [*linears, Linear("pooler.dense", hidden, hidden, True)], others + embeddings + _layer_norm(hidden)


_ATTENTION_BIAS = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
_GEMMA2 = {**_ATTENTION_BIAS, "norms": 4}

ARCHITECTURES: dict[str, Callable[[Config], Parts]] = {
    "llama": partial(_llama, **_ATTENTION_BIAS, mlp_bias="mlp_bias"),
    "mistral": _llama,
    "mixtral": partial(_llama, experts=_mixtral_experts),
    "qwen2": partial(_llama, qkv_bias=True),
    "qwen3": partial(_llama, **_ATTENTION_BIAS, head_norm=True),
    "qwen3_moe": partial(_llama, **_ATTENTION_BIAS, head_norm=True, experts=_qwen3_experts),
    "gemma": partial(_llama, **_ATTENTION_BIAS),
    "gemma2": partial(_llama, **_GEMMA2),
    "gemma3_text": partial(_llama, **_GEMMA2, head_norm=True),
    "smollm3": partial(_llama, **_ATTENTION_BIAS, mlp_bias="mlp_bias"),
    "granite": partial(_llama, **_ATTENTION_BIAS, mlp_bias="mlp_bias"),
    "olmo2": partial(_llama, **_ATTENTION_BIAS, width_norm=True),
    "stablelm": _stablelm,
    "phi": _phi,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "gptj": _gptj,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "falcon": _falcon,
    "bert": _bert,
    "roberta": _bert,
    "gpt3": partial(_gpt2, fused=False),  # of the LoRA paper, with separate W_q, W_k and W_v; not in transformers
}
ENCODERS = ("bert", "roberta")
TEXT_PARTS = {"gemma3": "gemma3_text"}  # a text_config that doesn't name its own type
