"""Which runtime takes which adapters: what each refuses, what it would read wrongly, and what `lora export` does about it.

    TRAITS     what an adapter may have that not every runtime takes
    RUNTIMES   what becomes of each trait there; a trait that is not listed is taken as it is

Only what a config and names tell is looked at, so that a recipe can be asked before it trains.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lora_cli.errors import ModelError, Problem
from lora_cli.lora.config import LoRAConfig, matches

MERGE = "`lora merge` it, and serve the merged model"
PLAIN = "train without DoRA, or `lora merge` it and `lora extract` a plain adapter"


@dataclass(frozen=True)
class Subject:
    """An adapter as runtimes see it, trained or still to be: its config, its modules, and those trained whole.

    `tied` where the base has one weight for its head and its embedding.
    """

    config: LoRAConfig
    paths: Sequence[str]
    whole: Sequence[str] = ()
    tied: bool = False

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
class Finding:
    """One trait of an adapter that a runtime does not take as it is."""

    runtime: str
    trait: str
    verdict: Verdict

    @property
    def what(self) -> str:
        return f"{RUNTIMES[self.runtime].name}: {TRAITS[self.trait].shown}: {self.verdict.why}"


def _any(*patterns: str) -> Callable[[Subject], bool]:
    return lambda subject: any(matches(pattern, path) for path in subject.paths for pattern in patterns)


HEADS = ("classifier", "score")  # of classifiers: the only modules that vLLM loads whole
VLLM_LARGEST, VLLM_DEFAULT = 512, 16  # ranks

TRAITS: Mapping[str, Trait] = {
    "dora": Trait("DoRA", lambda s: s.config.use_dora),
    "whole": Trait("modules trained whole", lambda s: bool(s.whole)),
    "whole_heads": Trait("a classifier's head", lambda s: any(path.endswith(HEADS) for path in s.whole)),
    "whole_others": Trait("modules trained whole", lambda s: any(not path.endswith(HEADS) for path in s.whole)),
    "rslora": Trait("rsLoRA", lambda s: s.config.use_rslora),
    "ranks": Trait("modules of different rank", lambda s: len(s.ranks) > 1),
    "scales": Trait("modules of different scale", lambda s: len(s.scales) > 1),
    "fraction": Trait("a fractional alpha", lambda s: s.config.lora_alpha != int(s.config.lora_alpha)),
    "rank_above_16": Trait("a rank above 16", lambda s: max(s.ranks, default=0) > VLLM_DEFAULT),
    "rank_above_512": Trait("a rank above 512", lambda s: max(s.ranks, default=0) > VLLM_LARGEST),
    "embedding": Trait("an adapted embedding", _any("embed_tokens|wte|embed_in|word_embeddings|tok_embeddings")),
    "head": Trait("an adapted head", _any("lm_head|embed_out")),
    "tied_head": Trait("an adapted head that is tied", lambda s: s.tied and TRAITS["head"].has(s)),
    "experts": Trait("adapted experts", _any(r"experts(\..*)?")),
}

_DORA = Verdict("refused", "its update depends on the base's row norms, which the runtime does not compute", PLAIN)
_WHOLE = Verdict("refused", "an adapter's whole modules are not loaded", MERGE)
_FOLDED = Verdict("converted", "the runtime knows one scale, alpha / r: the rest is folded into lora_B")
_UNIFORM = Verdict("converted", "the runtime knows one rank and one scale: ranks are padded with zeros, scales folded")

_LLAMA_CPP = {
    "dora": _DORA,
    "whole": _WHOLE,
    "rslora": Verdict("converted", "the loader computes alpha / r, and llama.cpp's own converter does not say otherwise: the scale is folded into lora_B"),
    "scales": Verdict("converted", "the loader has one alpha, and llama.cpp's own converter drops the others: scales are folded into lora_B"),
    "embedding": Verdict("refused", "adapted embeddings are not written yet", MERGE),
    "tied_head": Verdict("refused", "a GGUF file has no tensor of its own for a tied head", MERGE),
    "experts": Verdict("refused", "adapted experts are not written yet", MERGE),
}  # fmt: skip

RUNTIMES: Mapping[str, Runtime] = {
    "vllm": Runtime("vLLM", {
        "dora": Verdict("refused", "vLLM does not load DoRA", PLAIN),
        "whole_others": Verdict("refused", "vLLM loads no whole modules but a classifier's head", MERGE),
        "rank_above_512": Verdict("refused", "vLLM's largest `--max-lora-rank` is 512", "`lora resize` it"),
        "rank_above_16": Verdict("flag", "vLLM takes ranks up to 16 unless told otherwise", "start it with `--max-lora-rank`"),
    }),
    "sglang": Runtime("SGLang", {
        "dora": Verdict("refused", "SGLang does not apply DoRA's magnitudes", PLAIN),
        "whole": _WHOLE,
        "rslora": Verdict("converted", "SGLang computes alpha / r whatever the config says: the scale is folded into lora_B"),
        "ranks": _UNIFORM,
        "scales": _UNIFORM,
    }),
    "gguf-adapter": Runtime("llama.cpp", _LLAMA_CPP),
    "ollama": Runtime("Ollama", _LLAMA_CPP),
    "mlx": Runtime("MLX", {
        "dora": Verdict("refused", "MLX's DoRA is not written yet", PLAIN),
        "whole": _WHOLE,
        "rslora": _FOLDED,
        "ranks": _UNIFORM,
        "scales": _UNIFORM,
        "embedding": Verdict("refused", "adapted embeddings are not written yet", MERGE),
        "experts": Verdict("refused", "adapted experts are not written yet", MERGE),
    }),
}  # fmt: skip


def findings(runtime: str, subject: Subject) -> list[Finding]:
    """What of an adapter the runtime does not take as it is."""
    verdicts = RUNTIMES[runtime].verdicts
    return [Finding(runtime, trait, verdict) for trait, verdict in verdicts.items() if TRAITS[trait].has(subject)]


def check_served(runtime: str, subject: Subject) -> list[Finding]:
    """What is converted or needs a flag. Raises ModelError for what the runtime can't serve."""
    found = findings(runtime, subject)
    refused = [finding for finding in found if finding.verdict.outcome == "refused"]
    if refused:
        raise ModelError(*(Problem(finding.what, fix=finding.verdict.fix) for finding in refused))
    return found
