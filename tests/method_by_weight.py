"""Which method works on which weight: the table that the tests go through, cell by cell, and that docs/weights.md shows.

A cell that is not in WITHOUT is proved by `tests/lora/test_method_by_weight.py`; one that is, is refused there.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """A tiny model (see `tests/tiny.py`, and `tests/layers.py` for single layers), and targets in it."""

    model: str
    targets: tuple[str, ...]
    quantize: str = "none"  # as in a recipe, or by a package in the base's own files


WEIGHTS = {
    "`nn.Linear`": Row("qwen2", ("q_proj", "down_proj")),
    "`nn.Linear` in nf4, double quantised": Row("qwen2", ("q_proj", "down_proj"), "nf4"),
    "`nn.Linear` in int8": Row("qwen2", ("q_proj", "down_proj"), "int8"),
    "`nn.Linear` in torchao's int8": Row("qwen2", ("q_proj", "down_proj"), "torchao"),
    "`Conv1D` (GPT-2)": Row("gpt2", ("c_attn", "mlp.c_proj")),
    "q k v, and gate and up, in one weight (Phi-3)": Row("phi3", ("qkv_proj", "gate_up_proj")),
    "head": Row("llama", ("lm_head",)),
    "head tied to the embedding": Row("llama-tied", ("lm_head",)),
    "`nn.Embedding`": Row("llama", ("embed_tokens",)),
    "embedding tied to the head": Row("llama-tied", ("embed_tokens",)),
    "embedding that scales (Gemma)": Row("gemma3", ("embed_tokens",)),
    "`nn.Conv1d`": Row("Conv1d", ("proj",)),
    "`nn.Conv2d`": Row("Conv2d", ("proj",)),
    "`nn.Conv3d`": Row("Conv3d", ("proj",)),
    "experts of Mixtral": Row("mixtral", ("experts.gate_up_proj", "experts.down_proj")),
    "experts of Qwen3-MoE": Row("qwen3_moe", ("experts.gate_up_proj", "experts.down_proj")),
    "experts of gpt-oss": Row("gpt_oss", ("experts.gate_up_proj", "experts.down_proj")),
    "BERT": Row("bert", ("query", "value", "output.dense")),
    "RoBERTa": Row("roberta", ("query", "value", "output.dense")),
    "DistilBERT": Row("distilbert", ("q_lin", "v_lin", "lin2")),
    "DeBERTa": Row("deberta-v2", ("query_proj", "value_proj", "output.dense")),
    "ViT, with its patches' convolution": Row("vit", ("q_proj", "v_proj", "fc2", "projection")),
}

# Settings of a recipe's `lora`
METHODS: dict[str, dict] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "LoRA-FA": {"freeze_A": True},
    "PiSSA": {"init": "pissa"},
    "OLoRA": {"init": "olora"},
    "LoftQ": {"init": "loftq"},
    "EVA": {"init": "eva"},
    "gaussian": {"init": "gaussian"},
    "orthogonal": {"init": "orthogonal"},
    "bias: lora_only": {"bias": "lora_only"},
    "bias: all": {"bias": "all"},
    "ranks and alphas by pattern": {"rank_pattern": {".*": 3}, "alpha_pattern": {".*": 5}},
}

NO_MAGNITUDE = (
    "PEFT's format has no magnitudes for experts, and PEFT refuses `use_dora` beside `target_parameters`: nothing could "
    "read the adapter"
)
NOTHING_LOST = "LoftQ makes good what quantising took from a weight, and nothing is quantised here"
NOT_THERE = "LoftQ needs the weight before it was quantised, which a base that is quantised on disk does not have"
NO_VECTORS = (
    "EVA looks at the vectors that a linear layer takes, and some of these are none; PEFT's EVA refuses them too"
)
NO_BIAS = "There is no bias to train"
INSIDE = "The bias of gpt-oss's router acts on its choice of experts, and not on what it gives: train it in `modules_to_save`"

NOT_LINEAR = [name for name, row in WEIGHTS.items() if {"embed_tokens", "proj", "projection"} & {*row.targets}]
EXPERTS = [name for name in WEIGHTS if name.startswith("experts")]
WITHOUT_BIAS = [name for name, row in WEIGHTS.items() if row.model in ("llama", "llama-tied", "gemma3", "phi3")]
WITHOUT = {
    **{(name, "DoRA"): NO_MAGNITUDE for name in EXPERTS},
    **{(name, "LoftQ"): NOTHING_LOST for name, row in WEIGHTS.items() if row.quantize == "none"},
    ("`nn.Linear` in torchao's int8", "LoftQ"): NOT_THERE,
    **{(name, "EVA"): NO_VECTORS for name in (*NOT_LINEAR, *EXPERTS)},
    **{(name, "bias: lora_only"): NO_BIAS for name in (*WITHOUT_BIAS, *EXPERTS)},
    **{(name, "bias: all"): NO_BIAS for name in (*WITHOUT_BIAS, *EXPERTS)},
    ("experts of gpt-oss", "bias: all"): INSIDE,
}


def page() -> str:
    """docs/weights.md."""
    reasons = list(dict.fromkeys(WITHOUT.values()))
    lines = [
        "# Weights and methods",
        "",
        "Generated from the table that the tests go through (`tests/method_by_weight.py`); do not edit. In a cell with ✓",
        "`tests/lora/test_method_by_weight.py` proves, on a tiny real model: training starts at the base (with LoftQ nearer to",
        "the unquantised one); switched off, the adapter leaves the base's answers bit for bit; the adapter's file has as many",
        "parameters as the formula says, and reads back as it was written; PEFT reads it with the same logits and misses",
        "nothing; the merged weights answer as base + adapter. A number refers to the reason below.",
        "",
        "| | " + " | ".join(METHODS) + " |",
        "| --- |" + " :-: |" * len(METHODS),
    ]
    for weight in WEIGHTS:
        cells = [
            f"[{reasons.index(WITHOUT[weight, method]) + 1}]" if (weight, method) in WITHOUT else "✓"
            for method in METHODS
        ]
        lines.append(f"| {weight} | " + " | ".join(cells) + " |")
    lines += ["", *(f"[{i}] {reason}." for i, reason in enumerate(reasons, 1)), "", *NOTES]
    return "\n".join(lines) + "\n"


NOTES = """\
## What to know

- Letters and `all-linear` mean linear layers alone. Embeddings, convolutions, heads and experts are named in
  `lora.targets`: `embed_tokens`, `lm_head`, `experts.gate_up_proj`.
- **Tied weights.** Where embedding and head are one tensor, an adapter acts on the side that is named, as in PEFT (without
  its `ensure_weight_tying`), and training says so. A merge writes both weights and `tie_word_embeddings: false`; `lora
  unmerge` ties them again.
- **Embeddings** start at A = 0 and a normal B, as in loralib and PEFT; with `lora.freeze_A` at a random A and B = 0. They
  have no dropout.
- **Experts** that share a parameter get an A and a B each, in PEFT's `target_parameters` format. They have no dropout there:
  the file says 0. `lora inspect`, `compose`, `resize` and `extract` treat each expert as a weight of its own,
  `experts.down_proj[3]`, and a merge writes each into its own tensor where the base's files have it so.
- **Convolutions** with several groups are refused: PEFT's update sees all channels, so that no grouped weight could hold it
  merged, and its rank must be a multiple of the groups, of which depthwise ones have as many as channels. Dilation and padding modes are the base's own; PEFT passes neither on, and reads such an adapter wrongly. Through
  the command line they are proved where text reaches them (`tests/cli/test_convolutions.py`): SqueezeBERT's layers of one
  point, and DeBERTa-v2's convolution over three tokens; Conv2d and Conv3d as layers, and in the ViT above. The depthwise
  ones of Mamba, LFM2 and Falcon-H1 have a group a channel.
- nf4 and int8 weights are merged into the 16-bit base.
- **Quantised on disk.** A base whose own `config.json` has a `quantization_config` is loaded as it is (leave `model.quantize`
  out) wherever transformers and the package that it names can; its layer computes, and the adapter stands beside it in
  float32. `lora merge` and `lora export --to gguf` first make the 16-bit model that it stands for, once, in the cache. A
  layer that lets no gradient through, as where inputs are quantised too, is refused by name before anything trains.

  | quantised by | proved by | what is not proved |
  | --- | --- | --- |
  | bitsandbytes nf4, int8 | `tests/cli/test_quantised_on_disk.py`: train, resume, PEFT, eval, merge | |
  | torchao int8, int4 (weights alone) | the same tests and the row above, with torchao 0.18; `make test-torchao`, a part of `make check` | int4 in the layouts that only GPUs have; float8 |
  | HQQ | the laws of a layer over a layer of the same form; transformers 5.23 can't load such a base | a whole model |
  | GPTQ (2, 4, 8 bits), AWQ (GEMM, 4 bits) | the laws of a layer over layers with the packed tensors of their files (`tests/packed.py`) | a whole model: gptqmodel asks for a newer torch than is tested here; layers whose kernel reorders the codes train plain LoRA, and are not read for DoRA, PiSSA or a merge |
""".splitlines()
