"""What an adapter is, in PEFT's words and without torch.

How A and B *start* (kaiming, PiSSA …) is not here: it is a property of a run, not of the adapter that comes out of it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import sqrt
from typing import TypeVar

from lora_cli.errors import Problem, SafetyError
from lora_cli.limits import Exceeded, bounded

OF_EXPERT = re.compile(r"(.+)\[(\d+)\]")
REPEATS = re.compile(r"[*+?{]")
MOST_SECONDS = 1  # of processor time to match a pattern with a name
MOST_BYTES = 1_000_000_000
SHOWN_CHARACTERS = 80

Value = TypeVar("Value")

TAKEN_OFF = ("pissa", "olora")  # starts (`lora.init`) whose B A is taken off again, and saved in twice the rank

# PEFT's words for what the base is loaded as
CAUSAL_LM, SEQ_CLS = "CAUSAL_LM", "SEQ_CLS"


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """h = W₀x + scale · B A x, with scale = lora_alpha / r (Hu et al. 2021, section 4.1).

    `rank_pattern` and `alpha_pattern` give single modules another rank or alpha: keys are patterns (see `matches`),
    and the first that matches wins.
    """

    r: int
    lora_alpha: float
    target_modules: tuple[str, ...]
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"  # which biases are trained beside: none, all, lora_only
    trainable_tokens: tuple[int, ...] = ()  # tokens whose rows of the embeddings are trained beside
    freeze_A: bool = False  # A stays at its start and B is trained (LoRA-FA, Zhang et al. 2023, section 3.1)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = CAUSAL_LM
    target_parameters: tuple[str, ...] = ()  # endings of the paths of parameters that hold the weights of experts
    modules_to_save: tuple[str, ...] = ()  # endings of the paths of modules that are trained whole

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023, theorem 3.2)."""
        return self.lora_alpha / (sqrt(self.r) if self.use_rslora else self.r)

    def at(self, path: str) -> "LoRAConfig":
        """This config as it holds for the weight at `path`: patterns resolved into `r` and `lora_alpha`."""
        path, _ = of_expert(path)
        return replace(
            self,
            r=first_match(self.rank_pattern, path, self.r),
            lora_alpha=first_match(self.alpha_pattern, path, self.lora_alpha),
            rank_pattern={},
            alpha_pattern={},
        )

    def with_rank_times(self, factor: int) -> "LoRAConfig":
        """Every rank times `factor`, and every alpha such that no scale changes."""
        alpha_factor = sqrt(factor) if self.use_rslora else factor
        return replace(
            self,
            r=self.r * factor,
            lora_alpha=self.lora_alpha * alpha_factor,
            rank_pattern={pattern: r * factor for pattern, r in self.rank_pattern.items()},
            alpha_pattern={pattern: alpha * alpha_factor for pattern, alpha in self.alpha_pattern.items()},
        )


def of_expert(path: str) -> tuple[str, int | None]:
    """`mlp.experts.down_proj[3]`, the weight of one expert, is number 3 of the parameter `mlp.experts.down_proj`.

    Of any other path, the path itself and None.
    """
    found = OF_EXPERT.fullmatch(path)
    return (found[1], int(found[2])) if found else (path, None)


def matches(pattern: str, path: str) -> bool:
    """PEFT's rule for patterns: a regular expression over whole name segments at the end of the module's path."""
    match = partial(re.fullmatch, rf"(.*\.)?({pattern})", path)
    if not REPEATS.search(pattern):
        return match() is not None
    try:  # a pattern that repeats what repeats may take years to find that it does not match
        return bounded(match, seconds=MOST_SECONDS, most_bytes=MOST_BYTES) is not None
    except Exceeded as error:
        shown = pattern if len(pattern) <= SHOWN_CHARACTERS else pattern[:SHOWN_CHARACTERS] + "…"
        what = f"the pattern `{shown}` takes more than {error} on the name {path}"
        raise SafetyError(Problem(what, fix="write it without a repetition inside a repetition")) from error


def first_match(patterns: Mapping[str, Value], path: str, default: Value) -> Value:
    return next((value for pattern, value in patterns.items() if matches(pattern, path)), default)
