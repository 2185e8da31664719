"""What one transformer block keeps of its forward for its backward pass, in bytes a token: by formula, without torch.

A block is a sequence of stretches in the order of its forward. A frozen linear keeps nothing of its input, so what is
kept is: what norms, attention and activation functions need to pass a gradient on; the input of every linear that has an
adapter; and each adapter's own narrow product. Nothing is kept before the first adapter: no gradient goes there.

tests/budget/test_activations.py holds every row to what autograd saves on the real model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from lora_cli.budget.shapes import Config, falcon_norms, widths
from lora_cli.kernels.sizes import LOGITS_AT_ONCE

FLASH, EAGER = "flash_attention_2", "eager"  # transformers' names
FP32 = 4  # bytes; what norms compute in, whatever the model's type


@dataclass(frozen=True)
class Stretch:
    """`token` bytes are kept for every token, and `pair` for every token and token of its row (attention and masks).

    With `inputs_of`, it is the input of these linears: kept where one of them has an adapter; `alone` bytes where nothing
    before it is kept, which would hold it too. With `behind`, it is kept where a gradient goes through that linear.
    `probabilities` of each pair are kept where attention is computed step by step.
    """

    token: float = 0
    pair: float = 0
    inputs_of: tuple[str, ...] = ()
    alone: float = 0
    behind: str | None = None
    mlp: bool = False
    probabilities: int = 0
    widened: bool = False  # in float32, and so of an input in 16 bits a copy


@dataclass(frozen=True)
class Adapter:
    """The adapter of one linear."""

    r: int
    in_features: int
    out_features: int


@dataclass(frozen=True)
class How:
    """What decides, beside the architecture, what is kept: bytes of a number, attention, packed rows, the adapters' kind."""

    number: int = 2
    attention: str = "sdpa"  # transformers' name
    masked: bool = False  # attention gets an explicit mask: packed rows, or a window shorter than the row
    dropout: int = 0  # bytes of a number of the dropout's mask: 1 on CUDA, a number's own on a CPU; 0 without dropout
    use_dora: bool = False
    freeze_A: bool = False  # B alone is trained: the inputs of adapters are not needed again
    doubled: bool = False  # the start of A and B is taken off again: twice the rank
    # frozen linears hold what they read until they are passed backwards, also if that is computed again
    holds_inputs: bool = False
    widened: bool = False  # numbers of 16 bits are multiplied in float32: on a CPU without instructions for them
    logits_at_once: int | None = LOGITS_AT_ONCE["cuda"]  # a stretch of rows; None where the model makes all of them
    # a stretch is of labelled positions; else of all rows at the places where one has a label
    by_position: bool = False


@dataclass(frozen=True)
class Kept:
    """Bytes that a block keeps for each token of a row, and for each pair of tokens of a row."""

    token: float = 0
    pair: float = 0

    def __add__(self, other: "Kept") -> "Kept":
        return Kept(self.token + other.token, self.pair + other.pair)

    def __sub__(self, other: "Kept") -> "Kept":
        return Kept(self.token - other.token, self.pair - other.pair)

    def of(self, rows: int, row_length: int) -> float:
        """Bytes of so many rows."""
        return rows * row_length * (self.token + self.pair * row_length)


@dataclass(frozen=True)
class BlockMemory:
    """What a block keeps as a whole; what stays of it where its MLP, or all of it, is computed again; and what is there
    beside that once it has been."""

    whole: Kept
    without_mlp: Kept  # with the MLP's input, from which it is computed again
    entry: Kept
    mlp_again: Kept
    again: Kept
    behind_attention: Kept  # of the whole
    probabilities: int  # of each pair of tokens, that a gradient is made of
    ends_in_norm: bool


def block_memory(
    stretches: Sequence[Stretch],
    adapters: Mapping[str, Adapter],
    how: How,
    hidden: int,
    *,
    reached: bool,
    biased: bool = False,
) -> BlockMemory:
    """`adapters` by the linear's path inside the block; `reached` tells whether a gradient comes through to its input.

    Where its biases are trained, that of its first norm among them, a gradient comes through to what is behind that.
    """
    whole, rest, behind_attention, flows, dry = Kept(), Kept(), Kept(), reached, set[str]()
    held, held_in_mlp, mlp_input = Kept(), Kept(), None
    for i, stretch in enumerate(stretches):
        flows = flows or (biased and i > 0)
        reading = [adapters[path] for path in stretch.inputs_of if path in adapters]
        holds = how.holds_inputs and flows and stretch.inputs_of
        shared = not stretch.inputs_of or holds or (reading and not how.dropout and not how.freeze_A)
        token = stretch.token if flows else max(stretch.token, stretch.alone)
        kept = Kept(token, stretch.pair) if shared and (flows or reading) and stretch.behind not in dry else Kept()
        inputs = Kept(max(stretch.token, stretch.alone)) if holds else Kept()
        held += inputs
        held_in_mlp += inputs if stretch.mlp and mlp_input is not None else Kept()
        mlp_input = kept if stretch.mlp and mlp_input is None else mlp_input
        dry |= set() if flows else set(stretch.inputs_of) - set(adapters)
        kept += Kept(sum(_kept_by(adapter, how, flows) for adapter in reading))
        flows = flows or bool(reading)
        whole += kept
        rest += kept if not stretch.mlp else Kept()
        behind_attention = Kept() if stretch.probabilities else behind_attention + kept
    mlp_entry = Kept(next(stretch.token for stretch in stretches if stretch.mlp) if flows else 0)
    entry = Kept(how.number * hidden if flows else 0)
    copied = stretches[0].widened and how.number < FP32
    return BlockMemory(
        whole,
        without_mlp=rest + mlp_entry + held_in_mlp,
        entry=entry + held,
        mlp_again=whole - rest - mlp_input,
        again=whole if copied else whole - entry,
        behind_attention=behind_attention,
        probabilities=max(stretch.probabilities for stretch in stretches),
        ends_in_norm=stretches[-1].widened,
    )


def _kept_by(adapter: Adapter, how: How, flows: bool) -> float:
    """Of an adapter's own: its narrow product; with dropout its own input where A is trained, and a mask if a gradient
    goes through it; with DoRA both of its terms.
    """
    narrow = adapter.r * (2 if how.doubled else 1) * how.number
    of_input = 0 if how.freeze_A else how.number
    dropped = adapter.in_features * (of_input + flows * how.dropout) if how.dropout else 0
    dora = 2 * adapter.out_features * how.number if how.use_dora else 0
    return narrow + dropped + dora


def stretches(model_type: str, c: Config, how: How) -> list[Stretch]:
    """The block of an architecture; `c` is its config under the architecture's own names, complete."""
    return BLOCKS[model_type](c, how)


def last_norm(model_type: str, hidden: int, how: How) -> Kept:
    """What the norm behind the last block keeps."""
    return Kept(FP32 * hidden if model_type in RMS_NORMED else how.number * hidden)


def _rms_norm(width: int, count: int = 1) -> Stretch:
    """Computed in float32, which is what is kept, with one factor for each of `count` vectors."""
    return Stretch(FP32 * (width + count), widened=True)


def _layer_norm(width: int, how: How) -> Stretch:
    return Stretch(how.number * (width + 2))


def _attention(
    heads: int, queries: int, keys: int, how: How, *, softcap: bool = False, own_type: bool = False
) -> Stretch:
    """q, k, v and what comes out; with `eager` the probabilities of every pair, else one sum a head.

    Probabilities are float32, but for a softmax in the model's `own_type`.
    """
    if how.attention == EAGER:
        probabilities = how.number if own_type else _probability(how) + (how.number if softcap else 0)
        return Stretch(how.number * 3 * queries, pair=heads * probabilities, probabilities=heads)
    masked = how.masked and how.attention != FLASH
    # a mask stops sdpa from sharing keys among heads, and every layer makes numbers of it again
    wide = queries if masked else keys
    return Stretch(how.number * 2 * (queries + wide) + FP32 * heads, pair=how.number if masked else 0)


def _probability(how: How) -> int:
    """Bytes of one: made in float32, and kept in the model's type too where that is another."""
    return FP32 + (how.number if how.number < FP32 else 0)


def _output(name: str, width: int, how: How, *, copied: bool = False) -> Stretch:
    """The input of the output projection: it is what attention keeps itself, unless it has to be put in order first."""
    own = how.number * width
    return Stretch(own if copied or how.attention == EAGER else 0, inputs_of=(name,), alone=own)


def _gated_mlp(c: Config, how: How) -> list[Stretch]:
    """gate -> act, act(gate) · up -> down: act keeps its input, the product both of its factors."""
    hidden, inner = c["hidden_size"] * how.number, c["intermediate_size"] * how.number
    return [
        Stretch(hidden, inputs_of=("mlp.gate_proj", "mlp.up_proj"), mlp=True),
        Stretch(2 * inner, behind="mlp.gate_proj", mlp=True),
        Stretch(inner, mlp=True),
        Stretch(inner, inputs_of=("mlp.down_proj",), mlp=True),
    ]


def _mixture(c: Config, inner: int, how: How) -> list[Stretch]:
    """Experts are frozen parameters: what their activation functions, the weighting and the sorting keep, k times a token."""
    k, experts = c["num_experts_per_tok"], c["num_local_experts"]
    sorting = k * (4 * 8 + 3 * FP32) + FP32 * (experts + 1)
    return [
        Stretch(how.number * c["hidden_size"], inputs_of=("mlp.experts",), mlp=True),  # no linears: never adapted
        Stretch(k * how.number * (3 * inner + c["hidden_size"]) + sorting, mlp=True),
    ]


def _plain_mlp(
    paths: tuple[str, str], sizes: tuple[int, int], how: How, *, act: str, shared: bool = False
) -> list[Stretch]:
    """up -> act -> down; `shared`: it reads what attention reads."""
    (up, down), (hidden, inner) = paths, sizes
    kept, own_output = ACTIVATIONS[act]
    return [
        Stretch(0 if shared else hidden * how.number, inputs_of=(up,), mlp=True),
        Stretch(kept * inner * how.number, mlp=True),
        Stretch(0 if own_output else inner * how.number, inputs_of=(down,), alone=inner * how.number, mlp=True),
    ]


# How many vectors an activation function keeps, and whether its output, which down reads, is one of them
ACTIVATIONS = {"relu": (1, True), "gelu": (1, False), "gelu_new": (4, False)}


def _llama(
    c: Config,
    how: How,
    *,
    post_norms: bool = False,
    pre_norms: bool = True,
    head_norm: bool = False,
    width_norm: bool = False,
    softcap: bool = False,
    inner: Callable[[Config], int] | None = None,
) -> list[Stretch]:
    """Llama and its relatives; `inner` is the width of an expert, where a mixture stands in the MLP's place."""
    hidden, (head, queries, keys) = c["hidden_size"], widths(c)
    norm = [_rms_norm(hidden)]
    between = [_rms_norm(queries, queries // head), _rms_norm(keys, keys // head)] if head_norm else []
    between = [_rms_norm(queries), _rms_norm(keys)] if width_norm else between
    return [
        *(norm if pre_norms else []),
        Stretch(hidden * how.number, inputs_of=tuple(f"self_attn.{x}_proj" for x in "qkv")),
        *between,
        _attention(queries // head, queries, keys, how, softcap=softcap),
        _output("self_attn.o_proj", queries, how),
        *(norm if post_norms else []),
        *(norm if pre_norms else []),
        *(_mixture(c, inner(c), how) if inner else _gated_mlp(c, how)),
        *(norm if post_norms else []),
    ]


def _stablelm(c: Config, how: How) -> list[Stretch]:
    hidden, (head, queries, keys) = c["hidden_size"], widths(c)
    norm, parallel = _layer_norm(hidden, how), c["use_parallel_residual"]
    between = [_layer_norm(queries, how), _layer_norm(keys, how)] if c["qk_layernorm"] else []
    return [
        norm,
        Stretch(hidden * how.number, inputs_of=tuple(f"self_attn.{x}_proj" for x in "qkv")),
        *between,
        _attention(queries // head, queries, keys, how),
        _output("self_attn.o_proj", hidden, how, copied=True),
        *([] if parallel else [norm]),
        *(_gated_mlp(c, how)),
    ]


def _phi(c: Config, how: How) -> list[Stretch]:
    """Attention and MLP side by side, behind one norm."""
    hidden, (head, queries, keys) = c["hidden_size"], widths(c)
    between = [_layer_norm(queries, how), _layer_norm(keys, how)] if c["qk_layernorm"] else []
    return [
        _layer_norm(hidden, how),
        Stretch(hidden * how.number, inputs_of=(*(f"self_attn.{x}_proj" for x in "qkv"), "mlp.fc1")),
        *between,
        _attention(queries // head, queries, keys, how),
        _output("self_attn.dense", queries, how, copied=True),
        *_plain_mlp(("mlp.fc1", "mlp.fc2"), (hidden, c["intermediate_size"]), how, act="gelu_new", shared=True),
    ]


def _phi3(c: Config, how: How) -> list[Stretch]:
    """Fused projections: v keeps the whole of q, k and v, and the activation the whole of gate and up."""
    hidden, (head, queries, keys) = c["hidden_size"], widths(c)
    inner, number = c["intermediate_size"], how.number
    return [
        _rms_norm(hidden),
        Stretch(hidden * number, inputs_of=("self_attn.qkv_proj",)),
        _attention(queries // head, queries, keys, how),
        Stretch(0 if _repeated(queries, keys, how) else number * (queries + keys)),
        _output("self_attn.o_proj", queries, how, copied=True),
        _rms_norm(hidden),
        Stretch(hidden * number, inputs_of=("mlp.gate_up_proj",), mlp=True),
        Stretch(3 * inner * number, mlp=True),
        Stretch(inner * number, inputs_of=("mlp.down_proj",), mlp=True),
    ]


def _repeated(queries: int, keys: int, how: How) -> bool:
    """Whether v is repeated for all heads, and so no part of the fused projection any more."""
    return how.attention == EAGER or (how.masked and how.attention != FLASH and keys < queries)


def _gpt2(c: Config, how: How) -> list[Stretch]:
    hidden, inner, heads = c["n_embd"], c.get("n_inner") or 4 * c["n_embd"], c["n_head"]
    return [
        _layer_norm(hidden, how),
        Stretch(hidden * how.number, inputs_of=("attn.c_attn", "attn.q_proj", "attn.k_proj", "attn.v_proj")),
        _attention(heads, hidden, hidden, how, own_type=True),
        _output("attn.c_proj", hidden, how),
        _layer_norm(hidden, how),
        *_plain_mlp(("mlp.c_fc", "mlp.c_proj"), (hidden, inner), how, act="gelu_new"),
    ]


def _gptj(c: Config, how: How) -> list[Stretch]:
    """Attention, in float32, and MLP side by side, behind one norm."""
    hidden, inner, heads = c["n_embd"], c.get("n_inner") or 4 * c["n_embd"], c["n_head"]
    return [
        _layer_norm(hidden, how),
        Stretch(hidden * how.number, inputs_of=(*(f"attn.{x}_proj" for x in "qkv"), "mlp.fc_in")),
        Stretch((2 * FP32 + how.number) * hidden, pair=heads * _probability(how), probabilities=heads),
        _output("attn.out_proj", hidden, how, copied=True),
        *_plain_mlp(("mlp.fc_in", "mlp.fc_out"), (hidden, inner), how, act="gelu_new", shared=True),
    ]


def _gpt_neox(c: Config, how: How) -> list[Stretch]:
    """Attention and MLP side by side, each behind a norm of the same input; v keeps the whole of q, k and v."""
    hidden, inner, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    paths = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    return [
        _layer_norm(hidden, how),
        Stretch(hidden * how.number, inputs_of=("attention.query_key_value",)),
        _attention(heads, hidden, hidden, how),
        Stretch(0 if how.attention == EAGER else 2 * hidden * how.number),
        _output("attention.dense", hidden, how, copied=True),
        *_plain_mlp(paths, (hidden, inner), how, act="gelu"),
    ]


def _opt(c: Config, how: How) -> list[Stretch]:
    hidden, inner, heads = c["hidden_size"], c["ffn_dim"], c["num_attention_heads"]
    return [
        _layer_norm(hidden, how),
        Stretch(hidden * how.number, inputs_of=tuple(f"self_attn.{x}_proj" for x in "qkv")),
        _attention(heads, hidden, hidden, how),
        _output("self_attn.out_proj", hidden, how),
        _layer_norm(hidden, how),
        *_plain_mlp(("fc1", "fc2"), (hidden, inner), how, act="relu"),
    ]


def _falcon(c: Config, how: How) -> list[Stretch]:
    """Its keys are too few for sdpa's kernels where one serves all heads: the plain formula, in float32."""
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    inner, two_norms = c.get("ffn_hidden_size") or 4 * hidden, falcon_norms(c) == 2
    paths = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    norm = _layer_norm(hidden, how)
    plain = Stretch(3 * hidden * FP32, pair=heads * FP32, probabilities=heads)
    parallel = c["parallel_attn"] or c["new_decoder_architecture"]
    return [
        norm,
        Stretch(hidden * how.number, inputs_of=("self_attention.query_key_value", *(() if two_norms else paths[:1]))),
        plain if c["multi_query"] and not c["new_decoder_architecture"] else _attention(heads, hidden, hidden, how),
        _output("self_attention.dense", hidden, how, copied=True),
        *([norm] if two_norms and not parallel else []),
        *_plain_mlp(paths, (hidden, inner), how, act="gelu", shared=not two_norms),
    ]


def _bert(c: Config, how: How) -> list[Stretch]:
    hidden, inner, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    return [
        Stretch(hidden * how.number, inputs_of=tuple(f"attention.self.{x}" for x in ("query", "key", "value"))),
        _attention(heads, hidden, hidden, how),
        _output("attention.output.dense", hidden, how),
        _layer_norm(hidden, how),
        *_plain_mlp(("intermediate.dense", "output.dense"), (hidden, inner), how, act="gelu"),
        _layer_norm(hidden, how),
    ]


BLOCKS: dict[str, Callable[[Config, How], list[Stretch]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "gemma", "smollm3", "granite"), _llama),
    "qwen3": partial(_llama, head_norm=True),
    "mixtral": partial(_llama, inner=lambda c: c["intermediate_size"]),
    "qwen3_moe": partial(_llama, head_norm=True, inner=lambda c: c["moe_intermediate_size"]),
    "gemma2": partial(_llama, post_norms=True, softcap=True),
    "gemma3_text": partial(_llama, post_norms=True, head_norm=True),
    "olmo2": partial(_llama, pre_norms=False, post_norms=True, width_norm=True),
    "stablelm": _stablelm,
    "phi": _phi,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "gpt3": _gpt2,
    "gptj": _gptj,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "falcon": _falcon,
    "bert": _bert,
    "roberta": _bert,
}
RMS_NORMED = {name for name, block in BLOCKS.items() if getattr(block, "func", block) in (_llama, _phi3)}
