"""Which runtime takes which adapters: what each refuses, what it would read wrongly, and what `lora export` does about it.

    TRAITS     what an adapter may have that not every runtime takes
    RUNTIMES   what becomes of each trait there; a trait that is not listed is taken as it is

Only what a config and names tell is looked at, so that a recipe can be asked before it trains.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lora_cli.errors import ModelError, Problem, RecipeError
from lora_cli.lora.config import LoRAConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lora_cli.lora.adapter import Adapter

MERGE = "`lora merge` it, and serve the merged model"
PLAIN = "train without DoRA, or `lora merge` it and `lora extract` a plain adapter"


@dataclass(frozen=True)
class Subject:
    """An adapter as runtimes see it, trained or still to be: its config, its modules, and those trained whole.

    `kinds` are those of the weights it changes (`lora/weights.py`); `tied` where the base has one weight for its head and
    its embedding; `model_type` is transformers' name of its kind, None where the base is not at hand.
    """

    config: LoRAConfig
    paths: Sequence[str]
    whole: Sequence[str] = ()
    tied: bool = False
    model_type: str | None = None
    kinds: Collection[str] = ("linear",)

    @classmethod
    def of(cls, adapter: "Adapter", base: "PretrainedConfig | None" = None) -> "Subject":
        """A trained adapter, and the config of its base where that is at hand."""
        return cls(
            adapter.config,
            tuple(adapter.layers),
            [path for path in adapter.extras if path not in adapter.biases],
            tied=bool(getattr(base, "tie_word_embeddings", False)),  # images have no words
            model_type=base.model_type if base is not None else None,
            kinds=adapter.kinds,
        )

    @property
    def ranks(self) -> set[int]:
        return {self.config.at(path).r for path in self.paths}

    @property
    def scales(self) -> set[float]:
        return {self.config.at(path).scale for path in self.paths}


@dataclass(frozen=True)
class Trait:
    """`shown` names it in a sentence; `has` tells whether an adapter has it."""

    shown: str
    has: Callable[[Subject], bool]


@dataclass(frozen=True)
class Verdict:
    """What becomes of a trait in a runtime.

    `refused`: it can't be served, and `fix` is what to do. `converted`: the runtime would refuse it or read it wrongly,
    and `lora export` writes what it reads rightly. `flag`: the runtime takes it when it is started as `fix` says.
    """

    outcome: Literal["refused", "converted", "flag"]
    why: str
    fix: str = ""


@dataclass(frozen=True)
class Runtime:
    """A program that serves adapters, and what `--to` calls its format."""

    name: str
    verdicts: Mapping[str, Verdict]


@dataclass(frozen=True)
class Unserved:
    """One trait of an adapter that a runtime does not take as it is."""

    runtime: str
    trait: str
    verdict: Verdict

    @property
    def what(self) -> str:
        return f"{RUNTIMES[self.runtime].name}: {TRAITS[self.trait].shown}: {self.verdict.why}"


def _other_than(*model_types: str) -> Callable[[Subject], bool]:
    return lambda subject: subject.model_type is not None and subject.model_type not in model_types


def _is_head(path: str) -> bool:
    return path.endswith(("lm_head", "embed_out"))


# The kinds of models, by transformers' `model_type`, of which the tests hold the runtime's own answers against ours
LLAMA_CPP_KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2")
MLX_KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
# Of vLLM 0.33's own classes of models, those that take no adapters, and those that take none in an embedding or a head:
# what `scripts/check_vllm.py` finds in its sources
NOT_IN_VLLM = ("bloom", "cohere2_moe", "dbrx", "falcon", "falcon_mamba", "gemma3n_text", "gpt-sw3", "gpt2", "gptj", "hrm_text",
               "mamba", "mamba2", "mimo_v2_flash", "stablelm", "zamba2")  # fmt: skip
NO_TABLES_IN_VLLM = ("afmoe", "axk1", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "gemma", "gemma2", "gemma3_text",
                     "gemma4_text", "glm4", "glm4_moe", "glm4_moe_lite", "gpt_oss", "hy_v3", "laguna", "longcat_flash",
                     "minimax_m2", "ministral3", "mistral", "olmo_hybrid", "olmoe", "opt", "qwen2", "qwen2_moe", "qwen3_next")  # fmt: skip
POSITIONS = ("wpe", "embed_positions", "position_embeddings")
HEADS = ("classifier", "score")  # of classifiers: the only modules that vLLM loads whole
VLLM_LARGEST, VLLM_DEFAULT = 512, 16  # ranks

TRAITS: Mapping[str, Trait] = {
    "not_in_llama_cpp": Trait("a model of this kind", _other_than(*LLAMA_CPP_KINDS)),
    "not_in_mlx": Trait("a model of this kind", _other_than(*MLX_KINDS)),
    "not_in_vllm": Trait("a model of this kind", lambda s: s.model_type in NOT_IN_VLLM),
    "no_tables_in_vllm": Trait(
        "an adapted embedding or head in a model of this kind",
        lambda s: s.model_type in NO_TABLES_IN_VLLM and ("embedding" in s.kinds or any(map(_is_head, s.paths))),
    ),
    "dora": Trait("DoRA", lambda s: s.config.use_dora),
    "whole": Trait("modules trained whole", lambda s: bool(s.whole)),
    "whole_heads": Trait("a classifier's head", lambda s: any(path.endswith(HEADS) for path in s.whole)),
    "whole_others": Trait("modules trained whole", lambda s: any(not path.endswith(HEADS) for path in s.whole)),
    "biases": Trait("trained biases", lambda s: s.config.bias != LoRAConfig.bias),
    "rslora": Trait("rsLoRA", lambda s: s.config.use_rslora),
    "ranks": Trait("modules of different rank", lambda s: len(s.ranks) > 1),
    "scales": Trait("modules of different scale", lambda s: len(s.scales) > 1),
    "rank_above_16": Trait("a rank above 16", lambda s: max(s.ranks, default=0) > VLLM_DEFAULT),
    "rank_above_512": Trait("a rank above 512", lambda s: max(s.ranks, default=0) > VLLM_LARGEST),
    "tied_embedding": Trait("an adapted embedding that the head shares", lambda s: s.tied and "embedding" in s.kinds),
    "positions": Trait(
        "adapted positions", lambda s: "embedding" in s.kinds and any(p.endswith(POSITIONS) for p in s.paths)
    ),
    "dora_of_embedding": Trait("DoRA of an embedding", lambda s: s.config.use_dora and "embedding" in s.kinds),
    "embedding": Trait("an adapted embedding", lambda s: "embedding" in s.kinds),
    "convolution": Trait("an adapted convolution", lambda s: "convolution" in s.kinds),
    "experts": Trait("adapted experts", lambda s: "experts" in s.kinds),
    "tied_head": Trait("an adapted head that is tied", lambda s: s.tied and any(_is_head(path) for path in s.paths)),
}

_DORA = Verdict("refused", "its update depends on the base's row norms, which the runtime does not compute", PLAIN)
_BIASES = Verdict("refused", "an adapter's biases are not loaded", MERGE)
_WHOLE = Verdict("refused", "an adapter's whole modules are not loaded", MERGE)
_FOLDED = Verdict("converted", "the runtime knows one scale, alpha / r: the rest is folded into lora_B")
_UNIFORM = Verdict("converted", "the runtime knows one rank and one scale: ranks are padded with zeros, scales folded")

CONVERT = "`lora merge` it, and convert the merged model with the runtime's own converter"
_CONVOLUTION = Verdict("refused", "adapted convolutions are not loaded", MERGE)
_LLAMA_CPP = {
    "not_in_llama_cpp": Verdict("refused", f"its files are written for {', '.join(LLAMA_CPP_KINDS)}", CONVERT),
    "dora": _DORA,
    "whole": _WHOLE,
    "biases": _BIASES,
    "rslora": Verdict("converted", "the loader computes alpha / r, and llama.cpp's own converter does not say otherwise: the scale is folded into lora_B"),
    "scales": Verdict("converted", "the loader has one alpha, and llama.cpp's own converter drops the others: scales are folded into lora_B"),
    "tied_embedding": Verdict("refused", "llama.cpp would put what is the embedding's on the head too", MERGE),
    "positions": Verdict("refused", "llama.cpp looks for an adapter of the tokens' table alone", MERGE),
    "convolution": _CONVOLUTION,
    "tied_head": Verdict("refused", "a GGUF file has no tensor of its own for a tied head", MERGE),
    "experts": Verdict("refused", "adapted experts are not written yet", MERGE),
}  # fmt: skip

RUNTIMES: Mapping[str, Runtime] = {
    "vllm": Runtime("vLLM", {
        "not_in_vllm": Verdict("refused", f"vLLM's classes of {', '.join(NOT_IN_VLLM)} take no adapters", MERGE),
        "no_tables_in_vllm": Verdict("refused", f"vLLM takes adapted embeddings and heads in other kinds than {', '.join(NO_TABLES_IN_VLLM)}", MERGE),
        "dora": Verdict("refused", "vLLM does not load DoRA", PLAIN),
        "whole_others": Verdict("refused", "vLLM loads no whole modules but a classifier's head", MERGE),
        "biases": _BIASES,
        "convolution": _CONVOLUTION,
        "rank_above_512": Verdict("refused", "vLLM's largest `--max-lora-rank` is 512", "`lora resize` it"),
        "rank_above_16": Verdict("flag", "vLLM takes ranks up to 16 unless told otherwise", "start it with `--max-lora-rank`"),
    }),
    "sglang": Runtime("SGLang", {
        "dora": Verdict("refused", "SGLang does not apply DoRA's magnitudes", PLAIN),
        "whole": _WHOLE,
        "biases": _BIASES,
        "rslora": Verdict("converted", "SGLang computes alpha / r whatever the config says: the scale is folded into lora_B"),
        "ranks": _UNIFORM,
        "scales": _UNIFORM,
        "convolution": _CONVOLUTION,
        "experts": Verdict("refused", "whether SGLang loads adapted experts is not proved here", MERGE),
    }),
    "gguf-adapter": Runtime("llama.cpp", _LLAMA_CPP),
    "ollama": Runtime("Ollama", _LLAMA_CPP | {
        "embedding": Verdict("refused", "whether Ollama loads an adapted embedding is not proved here", MERGE),
    }),
    "mlx": Runtime("MLX", {
        "not_in_mlx": Verdict("refused", f"adapters are written for {', '.join(MLX_KINDS)}", CONVERT),
        "dora_of_embedding": Verdict("refused", "the magnitudes of MLX's are another's: one for each token", PLAIN),
        "whole": _WHOLE,
        "biases": _BIASES,
        "rslora": _FOLDED,
        "ranks": _UNIFORM,
        "scales": _UNIFORM,
        "tied_embedding": Verdict("refused", "MLX would put what is the embedding's on the head too", MERGE),
        "convolution": _CONVOLUTION,
        "experts": Verdict("refused", "adapted experts are not written yet", MERGE),
    }),
}  # fmt: skip


def runtime_called(name: str) -> str:
    """The format of a runtime, which may be called by that or by its own name. Raises RecipeError for others."""
    names = {key: key for key in RUNTIMES} | {runtime.name.lower(): key for key, runtime in RUNTIMES.items()}
    if name.strip().lower() not in names:
        raise RecipeError(Problem(f"`--for` knows no runtime {name!r}", fix=f"take some of {', '.join(names)}"))
    return names[name.strip().lower()]


def findings(runtime: str, subject: Subject) -> list[Unserved]:
    """What of an adapter the runtime does not take as it is."""
    verdicts = RUNTIMES[runtime].verdicts
    return [Unserved(runtime, trait, verdict) for trait, verdict in verdicts.items() if TRAITS[trait].has(subject)]


def check_served(runtime: str, subject: Subject) -> list[Unserved]:
    """What is converted or needs a flag. Raises ModelError for what the runtime can't serve."""
    found = findings(runtime, subject)
    refused = [finding for finding in found if finding.verdict.outcome == "refused"]
    if refused:
        raise ModelError(*(Problem(finding.what, fix=finding.verdict.fix) for finding in refused))
    return found
