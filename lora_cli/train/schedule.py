"""The learning rate as a pure function of the step: transformers' schedules under its names, without its import.

    1 ─     ╭──╮             warm-up, linear, then the curve: a factor of the
           ╱    ╲            steps done, those of the warm-up, and all of them
    0 ─   ╱      ╰────

transformers counts from 0 and would give the first step of a warm-up a rate of 0: here the warm-up takes its values from 1,
so that no step is spent on nothing. Its module loads all that a Trainer needs, PEFT and bitsandbytes among it: seconds.
"""

import math
from collections.abc import Callable

from lora_cli.recipe.schema import Training

Schedule = Callable[[int], float]
Curve = Callable[[int, int, int], float]

LEFT_OF_POLYNOMIAL = 1e-7
TIMESCALE = 10_000  # of `inverse_sqrt` without a warm-up


def make_schedule(settings: Training, steps: int) -> Schedule:
    """Step number (from 1) -> factor on the learning rate."""
    curve = CURVES[settings.lr_scheduler]
    warmup = 0 if settings.lr_scheduler == "constant" else round(settings.warmup_ratio * steps)
    return lambda step: step / warmup if step <= warmup else curve(step - 1, warmup, steps)


def _share(done: int, warmup: int, steps: int) -> float:
    return (done - warmup) / max(1, steps - warmup)


def _linear(done: int, warmup: int, steps: int) -> float:
    return max(0.0, (steps - done) / max(1, steps - warmup))


def _cosine(done: int, warmup: int, steps: int) -> float:
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * _share(done, warmup, steps))))


def _polynomial(done: int, warmup: int, steps: int) -> float:
    return (1.0 - LEFT_OF_POLYNOMIAL) * (1.0 - _share(done, warmup, steps)) + LEFT_OF_POLYNOMIAL


def _constant(done: int, warmup: int, steps: int) -> float:
    return 1.0


def _inverse_sqrt(done: int, warmup: int, steps: int) -> float:
    timescale = warmup or TIMESCALE
    return 1.0 / math.sqrt((done + timescale - warmup) / timescale)


CURVES: dict[str, Curve] = {
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine,  # of one wave, which is transformers' default
    "polynomial": _polynomial,
    "constant": _constant,
    "constant_with_warmup": _constant,
    "inverse_sqrt": _inverse_sqrt,
}
