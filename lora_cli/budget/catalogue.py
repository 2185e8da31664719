"""Popular bases by shape, so that a question about them needs no download. Fine-tuned siblings share their base's row.

Columns are those of `sizes` and `gpt_sizes`: vocabulary, hidden, inner, layers, heads, key-value heads.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from lora_cli.budget.defaults import gpt_sizes, sizes
from lora_cli.budget.shapes import Config

DEFAULT_MODEL = "Llama-2-7B"


@dataclass(frozen=True)
class Entry:
    """One shape: the name people use, the hub ids that have it, and what its config.json says about it."""

    name: str
    hub_ids: Sequence[str]
    config: Config


def find(name: str) -> Entry | None:
    """The entry with this name or hub id, in any case; `-Instruct`, `-it`, `-chat` and `-hf` make no difference."""
    return _by_name().get(name.lower()) or _by_name().get(_key(name))


def nearest(name: str) -> list[str]:
    """Names of entries that `name` may have meant, the likeliest first."""
    keys = {_key(entry.name): entry.name for entry in CATALOGUE}
    return [keys[key] for key in difflib.get_close_matches(_key(name.rsplit("/", 1)[-1]), keys, n=3, cutoff=0.5)]


@cache
def _by_name() -> dict[str, Entry]:
    exact = {name.lower(): entry for entry in CATALOGUE for name in _names(entry)}
    siblings = {_key(name): entry for entry in reversed(CATALOGUE) for name in _names(entry)}
    return siblings | exact


def _names(entry: Entry) -> list[str]:
    return [entry.name, *entry.hub_ids, *(hub_id.rsplit("/", 1)[-1] for hub_id in entry.hub_ids)]


def _key(name: str) -> str:
    return re.sub(r"-(instruct|chat|it|pt|hf)(?=-|$)", "", name.lower())


def _llama(vocab: int, hidden: int, inner: int, layers: int, heads: int, kv: int | None = None, **more) -> Config:
    return {"model_type": "llama", **sizes(vocab, hidden, inner, layers, heads, kv, **more)}


def _qwen2(hidden: int, inner: int, layers: int, heads: int, kv: int, *, vocab: int, tied: bool = False) -> Config:
    return {"model_type": "qwen2", **sizes(vocab, hidden, inner, layers, heads, kv, tie_word_embeddings=tied)}


def _qwen3(hidden: int, inner: int, layers: int, heads: int, *, tied: bool = False) -> Config:
    return {
        "model_type": "qwen3",
        **sizes(151936, hidden, inner, layers, heads, 8, head_dim=128, tie_word_embeddings=tied),
    }


def _gemma(model_type: str, *columns: int, head_dim: int, vocab: int) -> Config:
    return {"model_type": model_type, **sizes(vocab, *columns, head_dim=head_dim, tie_word_embeddings=True)}


def _opt(hidden: int, layers: int, heads: int, **more: object) -> Config:
    shape = {"vocab_size": 50272, "hidden_size": hidden, "ffn_dim": 4 * hidden, "num_hidden_layers": layers}
    return {"model_type": "opt", **shape, "num_attention_heads": heads, **more}


def _neox(vocab: int, hidden: int, layers: int, heads: int) -> Config:
    return {"model_type": "gpt_neox", **sizes(vocab, hidden, 4 * hidden, layers, heads)}


def _falcon(hidden: int, layers: int, heads: int, **more: object) -> Config:
    shape = {"vocab_size": 65024, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"model_type": "falcon", **shape, **more}


def _encoder(model_type: str, vocab: int, *columns: int, positions: int, types: int) -> Config:
    more = {"max_position_embeddings": positions, "type_vocab_size": types}
    return {"model_type": model_type, **sizes(vocab, *columns, **more)}


def _gpt2(hidden: int, layers: int, heads: int) -> Config:
    return {"model_type": "gpt2", **gpt_sizes(50257, hidden, layers, heads, 1024)}


def _pythia(size: str, *columns: int) -> Entry:
    return Entry(f"Pythia-{size}", (f"EleutherAI/pythia-{size}", f"EleutherAI/pythia-{size}-deduped"), _neox(*columns))


def _tied(config: Config) -> Config:
    return {**config, "tie_word_embeddings": True}


CATALOGUE: tuple[Entry, ...] = (
    Entry("Llama-2-7B", ("meta-llama/Llama-2-7b-hf",), _llama(32000, 4096, 11008, 32, 32)),
    Entry("Llama-2-13B", ("meta-llama/Llama-2-13b-hf",), _llama(32000, 5120, 13824, 40, 40)),
    Entry("Llama-2-70B", ("meta-llama/Llama-2-70b-hf",), _llama(32000, 8192, 28672, 80, 64, 8)),
    Entry("Llama-3-8B", ("meta-llama/Meta-Llama-3-8B",), _llama(128256, 4096, 14336, 32, 32, 8)),
    Entry("Llama-3-70B", ("meta-llama/Meta-Llama-3-70B",), _llama(128256, 8192, 28672, 80, 64, 8)),
    Entry(
        "Llama-3.1-8B",
        ("meta-llama/Llama-3.1-8B", "meta-llama/Meta-Llama-3.1-8B"),
        _llama(128256, 4096, 14336, 32, 32, 8),
    ),
    Entry(
        "Llama-3.1-70B",
        ("meta-llama/Llama-3.1-70B", "meta-llama/Meta-Llama-3.1-70B"),
        _llama(128256, 8192, 28672, 80, 64, 8),
    ),
    Entry(
        "Llama-3.1-405B",
        ("meta-llama/Llama-3.1-405B", "meta-llama/Meta-Llama-3.1-405B"),
        _llama(128256, 16384, 53248, 126, 128, 8),
    ),
    Entry("Llama-3.2-1B", ("meta-llama/Llama-3.2-1B",), _tied(_llama(128256, 2048, 8192, 16, 32, 8))),
    Entry("Llama-3.2-3B", ("meta-llama/Llama-3.2-3B",), _tied(_llama(128256, 3072, 8192, 28, 24, 8))),
    Entry("Llama-3.3-70B", ("meta-llama/Llama-3.3-70B-Instruct",), _llama(128256, 8192, 28672, 80, 64, 8)),
    Entry("TinyLlama-1.1B", ("TinyLlama/TinyLlama-1.1B-Chat-v1.0",), _llama(32000, 2048, 5632, 22, 32, 4)),
    Entry("SmolLM2-135M", ("HuggingFaceTB/SmolLM2-135M",), _tied(_llama(49152, 576, 1536, 30, 9, 3))),
    Entry("SmolLM2-360M", ("HuggingFaceTB/SmolLM2-360M",), _tied(_llama(49152, 960, 2560, 32, 15, 5))),
    Entry("SmolLM2-1.7B", ("HuggingFaceTB/SmolLM2-1.7B",), _tied(_llama(49152, 2048, 8192, 24, 32, 32))),
    Entry(
        "SmolLM3-3B",
        ("HuggingFaceTB/SmolLM3-3B", "HuggingFaceTB/SmolLM3-3B-Base"),
        {"model_type": "smollm3", **sizes(128256, 2048, 11008, 36, 16, 4)},
    ),
    Entry(
        "Mistral-7B-v0.1",
        ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-Instruct-v0.2"),
        {"model_type": "mistral", **sizes(32000, 4096, 14336, 32, 32, 8)},
    ),
    Entry(
        "Mistral-7B-v0.3",
        ("mistralai/Mistral-7B-v0.3",),
        {"model_type": "mistral", **sizes(32768, 4096, 14336, 32, 32, 8)},
    ),
    Entry(
        "Mistral-Nemo-12B",
        ("mistralai/Mistral-Nemo-Base-2407", "mistralai/Mistral-Nemo-Instruct-2407"),
        {"model_type": "mistral", **sizes(131072, 5120, 14336, 40, 32, 8, head_dim=128)},
    ),
    Entry(
        "Mixtral-8x7B",
        ("mistralai/Mixtral-8x7B-v0.1",),
        {"model_type": "mixtral", **sizes(32000, 4096, 14336, 32, 32, 8, num_local_experts=8)},
    ),
    Entry(
        "Mixtral-8x22B",
        ("mistralai/Mixtral-8x22B-v0.1",),
        {"model_type": "mixtral", **sizes(32000, 6144, 16384, 56, 48, 8, num_local_experts=8)},
    ),
    Entry(
        "Mixtral-8x22B-Instruct",
        ("mistralai/Mixtral-8x22B-Instruct-v0.1",),
        {"model_type": "mixtral", **sizes(32768, 6144, 16384, 56, 48, 8, num_local_experts=8)},
    ),
    Entry("Qwen2.5-0.5B", ("Qwen/Qwen2.5-0.5B",), _qwen2(896, 4864, 24, 14, 2, vocab=151936, tied=True)),
    Entry("Qwen2.5-1.5B", ("Qwen/Qwen2.5-1.5B",), _qwen2(1536, 8960, 28, 12, 2, vocab=151936, tied=True)),
    Entry("Qwen2.5-3B", ("Qwen/Qwen2.5-3B",), _qwen2(2048, 11008, 36, 16, 2, vocab=151936, tied=True)),
    Entry("Qwen2.5-7B", ("Qwen/Qwen2.5-7B",), _qwen2(3584, 18944, 28, 28, 4, vocab=152064)),
    Entry("Qwen2.5-14B", ("Qwen/Qwen2.5-14B",), _qwen2(5120, 13824, 48, 40, 8, vocab=152064)),
    Entry("Qwen2.5-32B", ("Qwen/Qwen2.5-32B",), _qwen2(5120, 27648, 64, 40, 8, vocab=152064)),
    Entry("Qwen2.5-72B", ("Qwen/Qwen2.5-72B",), _qwen2(8192, 29568, 80, 64, 8, vocab=152064)),
    Entry("Qwen3-0.6B", ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B-Base"), _qwen3(1024, 3072, 28, 16, tied=True)),
    Entry("Qwen3-1.7B", ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B-Base"), _qwen3(2048, 6144, 28, 16, tied=True)),
    Entry("Qwen3-4B", ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B-Base"), _qwen3(2560, 9728, 36, 32, tied=True)),
    Entry("Qwen3-8B", ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B-Base"), _qwen3(4096, 12288, 36, 32)),
    Entry("Qwen3-14B", ("Qwen/Qwen3-14B", "Qwen/Qwen3-14B-Base"), _qwen3(5120, 17408, 40, 40)),
    Entry("Qwen3-32B", ("Qwen/Qwen3-32B",), _qwen3(5120, 25600, 64, 64)),
    Entry(
        "Qwen3-30B-A3B",
        ("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B-Base"),
        {
            "model_type": "qwen3_moe",
            **sizes(151936, 2048, 6144, 48, 32, 4, head_dim=128, moe_intermediate_size=768, num_experts=128),
        },
    ),
    Entry("gemma-2-2b", ("google/gemma-2-2b",), _gemma("gemma2", 2304, 9216, 26, 8, 4, head_dim=256, vocab=256000)),
    Entry("gemma-2-9b", ("google/gemma-2-9b",), _gemma("gemma2", 3584, 14336, 42, 16, 8, head_dim=256, vocab=256000)),
    Entry(
        "gemma-2-27b", ("google/gemma-2-27b",), _gemma("gemma2", 4608, 36864, 46, 32, 16, head_dim=128, vocab=256000)
    ),
    Entry(
        "gemma-3-270m", ("google/gemma-3-270m",), _gemma("gemma3_text", 640, 2048, 18, 4, 1, head_dim=256, vocab=262144)
    ),
    Entry(
        "gemma-3-1b", ("google/gemma-3-1b-pt",), _gemma("gemma3_text", 1152, 6912, 26, 4, 1, head_dim=256, vocab=262144)
    ),
    Entry(
        "gemma-3-4b",
        ("google/gemma-3-4b-pt",),
        {"text_config": _gemma("gemma3_text", 2560, 10240, 34, 8, 4, head_dim=256, vocab=262208)},
    ),
    Entry(
        "gemma-3-12b",
        ("google/gemma-3-12b-pt",),
        {"text_config": _gemma("gemma3_text", 3840, 15360, 48, 16, 8, head_dim=256, vocab=262208)},
    ),
    Entry(
        "gemma-3-27b",
        ("google/gemma-3-27b-pt",),
        {"text_config": _gemma("gemma3_text", 5376, 21504, 62, 32, 16, head_dim=128, vocab=262208)},
    ),
    Entry("Phi-2", ("microsoft/phi-2",), {"model_type": "phi", **sizes(51200, 2560, 10240, 32, 32)}),
    Entry(
        "Phi-3-mini",
        ("microsoft/Phi-3-mini-4k-instruct", "microsoft/Phi-3-mini-128k-instruct", "microsoft/Phi-3.5-mini-instruct"),
        {"model_type": "phi3", **sizes(32064, 3072, 8192, 32, 32, 32)},
    ),
    Entry(
        "Phi-3-medium",
        ("microsoft/Phi-3-medium-4k-instruct", "microsoft/Phi-3-medium-128k-instruct"),
        {"model_type": "phi3", **sizes(32064, 5120, 17920, 40, 40, 10)},
    ),
    Entry("Phi-4", ("microsoft/phi-4",), {"model_type": "phi3", **sizes(100352, 5120, 17920, 40, 40, 10)}),
    Entry("GPT-2", ("openai-community/gpt2", "gpt2"), _gpt2(768, 12, 12)),
    Entry("GPT-2-medium", ("openai-community/gpt2-medium",), _gpt2(1024, 24, 16)),
    Entry("GPT-2-large", ("openai-community/gpt2-large",), _gpt2(1280, 36, 20)),
    Entry("GPT-2-xl", ("openai-community/gpt2-xl",), _gpt2(1600, 48, 25)),
    Entry("GPT-3-175B", (), {"model_type": "gpt3", **gpt_sizes(50257, 12288, 96, 96, 2048)}),
    Entry("OPT-125m", ("facebook/opt-125m",), _opt(768, 12, 12)),
    Entry("OPT-350m", ("facebook/opt-350m",), _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False)),
    Entry("OPT-1.3b", ("facebook/opt-1.3b",), _opt(2048, 24, 32)),
    Entry("OPT-6.7b", ("facebook/opt-6.7b",), _opt(4096, 32, 32)),
    _pythia("160m", 50304, 768, 12, 12),
    _pythia("410m", 50304, 1024, 24, 16),
    _pythia("1.4b", 50304, 2048, 24, 16),
    _pythia("2.8b", 50304, 2560, 32, 32),
    _pythia("6.9b", 50432, 4096, 32, 32),
    _pythia("12b", 50688, 5120, 36, 40),
    Entry("GPT-NeoX-20B", ("EleutherAI/gpt-neox-20b",), _neox(50432, 6144, 44, 64)),
    Entry("GPT-J-6B", ("EleutherAI/gpt-j-6b",), {"model_type": "gptj", **gpt_sizes(50400, 4096, 28, 16, 2048)}),
    Entry("Falcon-7B", ("tiiuae/falcon-7b",), _falcon(4544, 32, 71, multi_query=True)),
    Entry("Falcon-40B", ("tiiuae/falcon-40b",), _falcon(8192, 60, 128, num_kv_heads=8, new_decoder_architecture=True)),
    Entry(
        "all-MiniLM-L6-v2",
        ("sentence-transformers/all-MiniLM-L6-v2",),
        _encoder("bert", 30522, 384, 1536, 6, 12, positions=512, types=2),
    ),
    Entry(
        "BERT-base",
        ("google-bert/bert-base-uncased",),
        _encoder("bert", 30522, 768, 3072, 12, 12, positions=512, types=2),
    ),
    Entry(
        "BERT-large",
        ("google-bert/bert-large-uncased",),
        _encoder("bert", 30522, 1024, 4096, 24, 16, positions=512, types=2),
    ),
    Entry(
        "RoBERTa-base",
        ("FacebookAI/roberta-base",),
        _encoder("roberta", 50265, 768, 3072, 12, 12, positions=514, types=1),
    ),
    Entry(
        "RoBERTa-large",
        ("FacebookAI/roberta-large",),
        _encoder("roberta", 50265, 1024, 4096, 24, 16, positions=514, types=1),
    ),
)
