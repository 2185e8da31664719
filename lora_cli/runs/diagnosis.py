"""What the curves of a run say, and what to try next: a pure function of its events and its record.

One function a rule, `(Curves) -> Finding | None`, in the order in which they matter. A rule speaks only where its
numbers carry it, names them, and ends with what to change. A rule that has spoken may make others superfluous: after
a run that diverged nobody needs to hear that it had too few steps.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from typing import Any, Literal, NamedTuple

from lora_cli.errors import DivergedError, OutOfMemoryError
from lora_cli.recipe.schema import share_of
from lora_cli.runs.history import Curve, History, mean, number

Level = Literal["problem", "hint", "good"]

FEW_STEPS = 50  # below so many, a curve has no room to bend
JUDGED_STEPS = 20  # a curve of fewer is noise
NOTICEABLE = 0.01  # share of a loss: smaller changes are not talked about
SPIKE = 20  # times the median gradient norm around it
JUMP = 0.5  # nats above the median loss around it
WINDOW = 25  # steps before and after that count as around
STRIDE = 10  # steps that share what is around them
PADDED = 0.3  # share of the computed tokens
CUT = 0.05  # share of the rows
ROOM = 0.4  # of a device's memory: below it, there is room to spend
SLOWED = 0.6  # of the first steps' tokens a second
NOISY_TOKENS = 1000  # held-out tokens: with fewer, small differences mean nothing
RANKS = (8, 16, 32, 64)
TARGETS = ("qv", "qkvo", "all-linear")
USUAL_RATE = 1e-4  # LoRA's learning rates begin about here


@dataclass(frozen=True)
class Finding:
    """`evidence` are the numbers it rests on, `advice` says what they mean, `tries` what to give to `--set`, best first."""

    rule: str
    level: Level
    title: str
    evidence: str
    advice: str = ""
    tries: tuple[str, ...] = ()

    def line(self) -> str:
        """In one line, for the console."""
        first = f"; try --set {self.tries[0]}" if self.tries else ""
        return f"{self.title}: {self.evidence}{first}"


@dataclass(frozen=True)
class Curves:
    """What the rules look at."""

    history: History
    record: Mapping[str, Any]

    def setting(self, key: str, default: Any = None) -> Any:
        """The resolved value of a recipe's key."""
        found = _at(self.record, "settings").get(key)
        return default if found is None else found

    def of_record(self, *path: str) -> Any:
        *blocks, key = path
        return _at(self.record, *blocks).get(key)

    @cached_property
    def losses(self) -> Curve:
        return self.history.curve("loss")

    @cached_property
    def held_out(self) -> Curve:
        return self.history.evaluated()

    @cached_property
    def steps(self) -> int:
        return len(self.history.steps)

    @cached_property
    def start(self) -> float | None:
        """The mean training loss of the first tenth of the steps."""
        return mean([loss for _, loss in self.losses[: self.tenth]]) if self.losses else None

    @cached_property
    def end(self) -> float | None:
        return mean([loss for _, loss in self.losses[-self.tenth :]]) if self.losses else None

    @cached_property
    def rate(self) -> float | None:
        """The highest learning rate."""
        peak = max((lr for _, lr in self.history.curve("lr")), default=None)
        return number(self.setting("training.learning_rate")) or peak

    @cached_property
    def epochs(self) -> float | None:
        """How often each row was seen."""
        examples = number(self.of_record("resolved", "epoch_length")) or number(
            self.of_record("data", "train", "examples")
        )
        batch = number(self.setting("training.global_batch_size"))
        return self.steps * batch / examples if examples and batch else None

    @cached_property
    def spread(self) -> float:
        """The standard error of a tenth's mean: how far `start` and `end` may lie from the truth by chance."""
        return self.deviation / math.sqrt(self.tenth)

    @cached_property
    def gain(self) -> float:
        """The share by which the held-out loss fell; 0 where that is not known."""
        if len(self.held_out) < 2 or self.held_out[0][1] <= 0:
            return 0.0
        return 1 - self.held_out[-1][1] / self.held_out[0][1]

    @cached_property
    def noticeable(self) -> float:
        """The share of a held-out loss below which a difference is not talked about."""
        tokens = max((number(event.get("tokens")) or 0 for event in self.history.evaluations), default=0)
        return 5 * NOTICEABLE if 0 < tokens < NOISY_TOKENS else NOTICEABLE

    @cached_property
    def deviation(self) -> float:
        """How much losses of neighbouring steps differ by chance."""
        around = [later - before for (_, before), (_, later) in zip(self.losses, self.losses[1:], strict=False)]
        return math.sqrt(mean([step**2 for step in around]) / 2) if around else 0.0

    @property
    def tenth(self) -> int:
        return min(max(5, len(self.losses) // 10), max(1, len(self.losses) // 2))


def diagnose(history: History, record: Mapping[str, Any]) -> list[Finding]:
    """What stands out, the most pressing first; one good word where nothing does."""
    curves = Curves(history, record)
    found: list[Finding] = []
    silenced: set[str] = set()
    for rule in RULES:
        finding = None if rule.name in silenced else rule.check(curves)
        if finding:
            found.append(_that_can_be_tried(finding, curves))
            silenced |= rule.silences
    found.sort(key=lambda finding: finding.level != "problem")
    if not any(finding.level == "problem" for finding in found) and (good := _went_well(curves)):
        found.insert(0, good)
    return found


def _that_can_be_tried(finding: Finding, c: Curves) -> Finding:
    """Without settings of an adapter where none is trained."""
    if c.setting("training.method") != "full":
        return finding
    return replace(finding, tries=tuple(change for change in finding.tries if not change.startswith("lora.")))


def diverged(c: Curves) -> Finding | None:
    if c.of_record("result", "exit_code") != DivergedError.code or c.history.finished:
        return None
    last = c.losses[-1] if c.losses else None
    where = f"the run stopped after step {c.history.last_step}"
    where += f", with a loss of {last[1]:.3g}" if last else ""
    where += f", at a learning rate of up to {c.rate:.2g}" if c.rate else ""
    return Finding(
        "diverged",
        "problem",
        "the run diverged",
        where,
        "Loss or gradients were no numbers any more. A lower learning rate mostly cures it; a longer warm-up helps where "
        "it happens in the first steps.",
        (*_lower_rate(c, 4), "training.warmup_ratio=0.1"),
    )


def learning_rate_too_high(c: Curves) -> Finding | None:
    """Steps that leap out of their surroundings, or a training loss that ends above where it was."""
    if c.steps < JUDGED_STEPS:
        return None
    leaps = _leaps(c)
    rose = c.end - min(smoothed(c.losses, c.tenth)) if c.losses else 0.0
    turned = c.losses and rose > max(0.05 * c.end, 5 * c.spread, 0.1)
    if len(leaps) < max(2, c.steps // 200) and not turned:
        return None
    parts = []
    if leaps:
        named = ", ".join(map(str, leaps[:4])) + (" …" if len(leaps) > 4 else "")
        parts.append(f"{len(leaps)} of {c.steps:,} steps leap out of their surroundings (step {named})")
    if turned:
        parts.append(f"the training loss ends {rose:.2f} above its lowest, at {c.end:.2f}")
    return Finding(
        "learning_rate_too_high",
        "problem",
        "the learning rate is too high",
        "; ".join(parts) + (f"; the rate goes up to {c.rate:.2g}" if c.rate else ""),
        "Steps that overshoot undo what was learned. Lower the rate, or warm up for longer.",
        (*_lower_rate(c, 3), "training.warmup_ratio=0.1"),
    )


def over_fitting(c: Curves) -> Finding | None:
    """The held-out loss turned while the training loss went on falling."""
    if len(c.held_out) < 3 or c.steps < JUDGED_STEPS:
        return None
    best_step, best = min(c.held_out, key=lambda point: (point[1], point[0]))
    last_step, last = c.held_out[-1]
    before = _mean_near(c, best_step)
    if best_step == last_step or last - best <= c.noticeable * best or before is None or before <= c.end:
        return None
    tries = [_shorter(c, best_step)]
    dropout = number(c.setting("lora.dropout", 0.0)) or 0.0
    tries += ["lora.dropout=0.1"] if dropout < 0.1 else []
    tries += _smaller_rank(c)
    return Finding(
        "over_fitting",
        "problem",
        "it over-fits",
        f"the held-out loss was lowest at step {best_step} ({best:.3f}) and ends at {last:.3f}, "
        f"while the training loss went on from {before:.2f} to {c.end:.2f}",
        "From there on it learned the rows by heart instead of what they have in common. Train for less long; dropout, a "
        "smaller rank or more rows help as well.",
        tuple(tries),
    )


def nothing_gained(c: Curves) -> Finding | None:
    """Held-out rows are no better predicted than by the base."""
    if len(c.held_out) < 2 or c.held_out[0][0] != 0 or c.steps < JUDGED_STEPS:
        return None
    before, after = c.held_out[0][1], c.held_out[-1][1]
    if after < before:
        return None
    fell = c.start is not None and c.start - c.end > max(NOTICEABLE * c.start, 2 * c.spread)
    advice = (
        "It learned its own rows and nothing that carries over: train for less long and look at whether the held-out rows "
        "are of the same kind (`lora data RECIPE --held-out`)."
        if fell
        else "Neither the rows it saw nor the others got better: look at what is trained (`lora data RECIPE`), then try "
        "another learning rate."
    )
    return Finding(
        "nothing_gained",
        "problem",
        "held-out rows gained nothing",
        f"their loss was {before:.3f} before training and is {after:.3f} after it",
        advice,
        (_shorter(c, c.history.last_step // 2), "lora.dropout=0.1")
        if fell
        else (*_higher_rate(c, 3), *_larger_rank(c)),
    )


def learning_rate_too_low(c: Curves) -> Finding | None:
    """The training loss did not move."""
    if c.steps < JUDGED_STEPS or c.start is None or c.start < 0.1:
        return None
    fell = c.start - c.end
    if fell > max(0.02 * c.start, 2 * c.spread) or c.gain > 0.02:
        return None
    low = c.rate is not None and c.rate < USUAL_RATE
    return Finding(
        "learning_rate_too_low",
        "problem",
        "the learning rate is too low" if low else "the training loss hardly moves",
        f"it was {c.start:.2f} over the first steps and is {c.end:.2f} over the last, after {c.steps:,} steps"
        + (f" at a rate of up to {c.rate:.2g}" if c.rate else ""),
        "LoRA takes about ten times the rate of full fine-tuning, 1e-4 to 5e-4 for most models."
        if low
        else "Try a higher rate first, then a larger adapter. If the loss is low from the start, the base knows these rows "
        "already.",
        (*_higher_rate(c, 10 if low else 3), *_larger_rank(c)),
    )


def dead_modules(c: Curves) -> Finding | None:
    """Modules whose update is zero, or next to nothing beside the others."""
    updates = {path: norm for path, norm in _updates(c.record).items() if norm is not None}
    largest = max(updates.values(), default=0.0)
    dead = [path for path, norm in updates.items() if norm <= 1e-6 * largest]
    if not dead or largest == 0.0:
        return None
    kinds = sorted({path.rpartition(".")[2] for path in dead})
    return Finding(
        "dead_modules",
        "problem" if len(dead) >= 0.1 * len(updates) else "hint",
        "some modules learned nothing",
        f"the update of {len(dead)} of {len(updates)} modules is zero, first {dead[0]}",
        "No gradient reached them: the model may not use them for these rows. Leaving them out saves their parameters.",
        (f"lora.exclude=[{', '.join(kinds)}]",) if len(dead) == _count_of_kinds(updates, kinds) else (),
    )


def skipped_steps(c: Curves) -> Finding | None:
    """Steps that were left out, because loss or gradient was no number."""
    skipped = c.history.named("skipped")
    if not skipped:
        return None
    named = ", ".join(str(event["step"]) for event in skipped[:4]) + (" …" if len(skipped) > 4 else "")
    return Finding(
        "skipped_steps",
        "problem" if len(skipped) > max(3, 0.01 * c.steps) else "hint",
        "steps were skipped",
        f"{len(skipped)} had a loss or gradient that is no number (step {named})",
        "events.jsonl names their rows: look at those first. If they are in order, lower the learning rate.",
        _lower_rate(c, 2),
    )


def too_few_steps(c: Curves) -> Finding | None:
    planned = c.history.planned_steps or c.steps
    if not c.steps or planned >= FEW_STEPS:
        return None
    batch = number(c.setting("training.global_batch_size"))
    tries = [f"training.global_batch_size={max(4, int(batch) // 4)}"] if batch and batch >= 8 else []
    return Finding(
        "too_few_steps",
        "hint",
        "few steps",
        f"{planned} optimizer steps" + (f" of {batch:.0f} rows" if batch else ""),
        "An adapter mostly wants 100 steps or more: smaller batches make more of the same rows, more epochs see them again.",
        (*tries, *_longer(c)),
    )


def under_fitting(c: Curves) -> Finding | None:
    """Losses still fall at the end, although the learning rate has gone down by then."""
    if c.steps < JUDGED_STEPS:
        return None
    evidence = _still_falls(c)
    if evidence is None:
        return None
    return Finding(
        "under_fitting",
        "hint",
        "it could learn more",
        evidence,
        "Train for longer first. If that no longer helps, give the adapter more room: a larger rank, then more modules.",
        (*_longer(c), *_larger_rank(c), *_more_targets(c)),
    )


def eval_missing(c: Curves) -> Finding | None:
    if not c.steps or c.held_out:
        return None
    return Finding(
        "eval_missing",
        "hint",
        "nothing is held out",
        f"{c.steps:,} steps without a held-out loss: the curves can't tell learning from learning by heart",
        "Hold a share of the rows out: they are measured before the first step and after the last.",
        ("data.eval=5%",),
    )


def eval_too_rare(c: Curves) -> Finding | None:
    """Two points are no curve: over-fitting between them can't be seen, but the gap may hint at it."""
    if not 0 < len(c.held_out) < 3 or c.steps < FEW_STEPS:
        return None
    last = c.held_out[-1][1]
    gap = last - c.end
    wide = gap > max(0.3 * last, 0.3) and (c.epochs or 0) > 1.5
    every = _round_number(max(5, c.steps // 8))
    more = f", and the training loss ends {gap:.2f} below it, at {c.end:.2f}" if wide else ""
    return Finding(
        "eval_too_rare",
        "hint",
        "it may over-fit" if wide else "too few evaluations to see a curve",
        f"the held-out loss was measured {len(c.held_out)} times in {c.steps:,} steps{more}",
        "Evaluate on the way, to see where the held-out loss turns.",
        (f"training.eval_steps={every}",),
    )


def eval_too_small(c: Curves) -> Finding | None:
    tokens = max((number(event.get("tokens")) or 0 for event in c.history.evaluations), default=0)
    if not 0 < tokens < NOISY_TOKENS:
        return None
    share = share_of(str(c.setting("data.eval", "")))
    return Finding(
        "eval_too_small",
        "hint",
        "few held-out tokens",
        f"the held-out loss is a mean over {tokens:,.0f} tokens",
        "Differences of a few hundredths mean nothing on so little. Hold more rows out.",
        (f"data.eval={200 * share:g}%",) if share and share <= 0.1 else (),
    )


def cut_rows(c: Curves) -> Finding | None:
    rows, cut = (number(c.of_record("data", "train", key)) for key in ("rows", "cut_rows"))
    if not rows or not cut or cut / rows <= CUT:
        return None
    lost, kept = (number(c.of_record("data", "train", key)) or 0 for key in ("cut_tokens", "tokens"))
    p95 = number(c.of_record("data", "train", "lengths", "p95"))
    return Finding(
        "cut_rows",
        "hint",
        "many rows are cut",
        f"`data.max_length` cuts {cut:,.0f} of {rows:,.0f} rows and {lost / (lost + kept):.0%} of all tokens",
        "What is cut off is never learned, the end of an answer with its stop token among it.",
        (f"data.max_length={p95:.0f}",) if p95 else (),
    )


def too_much_padding(c: Curves) -> Finding | None:
    filled = number(c.of_record("resolved", "filled"))
    if filled is None or 1 - filled <= PADDED:
        return None
    packs = c.of_record("resolved", "row_length") is not None
    packable = not packs and c.setting("data.packing") in (None, False)
    advice = {
        True: "Packing puts several rows into one, and changes neither losses nor steps.",
        False: "The rows of a step don't fill what they are packed into: more rows a step, or a smaller `data.max_length`, "
        "waste less."
        if packs
        else "This model's rows can't be packed; rows of like length in one forward waste less, and so do small forwards.",
    }
    return Finding(
        "too_much_padding",
        "hint",
        "time goes into padding",
        f"{1 - filled:.0%} of the tokens that are computed are padding",
        advice[packable],
        ("data.packing=true",) if packable else (),
    )


def slowed_down(c: Curves) -> Finding | None:
    speeds = [speed for _, speed in c.history.curve("tokens_per_second")]
    quarter = len(speeds) // 4
    if len(speeds) < 40:
        return None
    first, last = median(speeds[1 : 1 + quarter]), median(speeds[-quarter:])
    if last >= SLOWED * first:
        return None
    return Finding(
        "slowed_down",
        "hint",
        "it slowed down",
        f"{first:,.0f} tokens a second over the first quarter of the steps, {last:,.0f} over the last",
        "The machine did that, not the run: something else ran beside it, it got hot, or memory was swapped.",
    )


def memory_unused(c: Curves) -> Finding | None:
    """An accelerator with much room left could spend it on speed."""
    devices = c.of_record("machine", "devices")
    devices = devices if isinstance(devices, list) else []
    memory = [number(device.get("memory_bytes")) for device in devices if isinstance(device, Mapping)]
    peak = number(c.of_record("result", "peak_bytes"))
    if not memory or not memory[0] or not peak or peak > ROOM * memory[0]:
        return None
    if not str(c.of_record("resolved", "device") or "").startswith("cuda"):
        return None
    tries = []
    if c.of_record("resolved", "gradient_checkpointing"):
        tries.append("training.gradient_checkpointing=false")
    if c.setting("model.quantize", "none") != "none":
        tries.append("model.quantize=none")
    micro = number(c.of_record("resolved", "micro_batch_size"))
    batch = number(c.setting("training.global_batch_size"))
    if micro and batch and micro * 2 <= batch:
        tries.append(f"training.micro_batch_size={micro * 2:.0f}")
    if not tries:
        return None
    return Finding(
        "memory_unused",
        "hint",
        "it could be faster",
        f"at most {peak / 1e9:.1f} of {memory[0] / 1e9:.0f} GB of the device's memory were in use",
        "Memory buys speed: none of these changes what is learned but by rounding.",
        tuple(tries),
    )


def memory_ran_out(c: Curves) -> Finding | None:
    events = c.history.named("outofmemory") + c.history.named("out_of_memory")
    if not events and c.of_record("result", "exit_code") != OutOfMemoryError.code:
        return None
    micro = number(c.of_record("resolved", "micro_batch_size"))
    tries = [f"training.micro_batch_size={max(1, int(micro) // 2)}"] if micro and micro > 1 else []
    if not c.of_record("resolved", "gradient_checkpointing"):
        tries.append("training.gradient_checkpointing=true")
    return Finding(
        "memory_ran_out",
        "problem" if not events else "hint",
        "memory ran out",
        f"taken again with less at a time: {len(events):,} of {c.history.last_step or len(events):,} steps"
        if events
        else "the run ended for it",
        "A smaller micro-batch changes memory and speed alone, never the gradients.",
        tuple(tries),
    )


class Rule(NamedTuple):
    check: Callable[[Curves], Finding | None]
    silences: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return self.check.__name__


_OF_LEARNING = frozenset(
    {
        "learning_rate_too_high",
        "over_fitting",
        "nothing_gained",
        "learning_rate_too_low",
        "under_fitting",
        "too_few_steps",
        "eval_too_rare",
    }
)

RULES = (
    Rule(diverged, _OF_LEARNING | {"skipped_steps"}),
    Rule(memory_ran_out, frozenset({"memory_unused"})),
    Rule(learning_rate_too_high, _OF_LEARNING - {"over_fitting", "eval_too_rare"}),
    Rule(over_fitting, frozenset({"nothing_gained", "under_fitting", "too_few_steps"})),
    Rule(nothing_gained, frozenset({"learning_rate_too_low", "under_fitting", "too_few_steps"})),
    Rule(learning_rate_too_low, frozenset({"under_fitting"})),
    Rule(dead_modules),
    Rule(skipped_steps),
    Rule(too_few_steps),
    Rule(under_fitting),
    Rule(eval_missing),
    Rule(eval_too_rare),
    Rule(eval_too_small),
    Rule(cut_rows),
    Rule(too_much_padding),
    Rule(slowed_down),
    Rule(memory_unused),
)


def smoothed(points: Curve, window: int) -> list[float]:
    """The mean over `window` points around each, fewer at the ends."""
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    half, count = max(1, window // 2), len(points)
    bounds = [(max(0, i - half), min(count, i + half + 1)) for i in range(count)]
    return [(sums[high] - sums[low]) / (high - low) for low, high in bounds]


def _went_well(c: Curves) -> Finding | None:
    if c.gain > c.noticeable:
        before, after = c.held_out[0][1], c.held_out[-1][1]
        evidence = f"the held-out loss fell from {before:.3f} to {after:.3f}"
        return Finding(
            "went_well", "good", "it learned", evidence, "Rows it never saw are predicted better than before."
        )
    if not c.held_out and c.steps >= JUDGED_STEPS and c.start - c.end > max(2 * NOTICEABLE * c.start, 2 * c.spread):
        evidence = f"the training loss fell from {c.start:.2f} to {c.end:.2f}"
        return Finding("went_well", "good", "it learned its rows", evidence)
    return None


def _leaps(c: Curves) -> list[int]:
    """Steps whose loss or gradient norm is far above that of the steps around, warm-up left out."""
    norms = dict(c.history.curve("grad_norm"))
    warmup = int((number(c.setting("training.warmup_ratio", 0)) or 0) * len(c.losses))
    found = []
    for start in range(0, len(c.losses), STRIDE):
        around = c.losses[max(0, start - WINDOW) : start + STRIDE + WINDOW]
        usual = median(loss for _, loss in around)
        scatter = 1.48 * median(abs(loss - usual) for _, loss in around)  # the deviation of what is spread normally
        known = [norms[step] for step, _ in around if step in norms]
        highest = SPIKE * median(known) if known else 0.0
        for step, loss in c.losses[max(start, warmup) : start + STRIDE]:
            if loss - usual > max(JUMP, 8 * scatter) or norms.get(step, 0.0) > highest > 0:
                found.append(step)
    return found


def _still_falls(c: Curves) -> str | None:
    """How the losses fell over the last quarter of the run, where that is more than chance.

    Held-out losses decide where there are some; a training loss only within the first epoch, for then on it sees rows
    again and falls for that.
    """
    if len(c.held_out) >= 3:
        last_step, last = c.held_out[-1]
        before_step, before = max(point for point in c.held_out if point[0] <= 0.8 * last_step)
        falls = before - last > 1.5 * c.noticeable * before and last == min(loss for _, loss in c.held_out)
        return f"the held-out loss still fell from {before:.3f} at step {before_step} to {last:.3f}" if falls else None
    quarter = len(c.losses) // 4
    if (c.epochs or 0) > 1.05 or quarter < 5:
        return None
    third, fourth = (
        mean([loss for _, loss in part]) for part in (c.losses[-2 * quarter : -quarter], c.losses[-quarter:])
    )
    if third - fourth <= max(2 * NOTICEABLE * third, 3 * c.deviation / math.sqrt(quarter)):
        return None
    return f"the training loss still fell from {third:.2f} to {fourth:.2f} over the last half of the steps"


def _mean_near(c: Curves, step: int) -> float | None:
    """The training loss around a step."""
    near = [loss for at, loss in c.losses if abs(at - step) <= max(3, c.tenth // 2)]
    return mean(near) if near else c.start


def _lower_rate(c: Curves, factor: float) -> tuple[str, ...]:
    return (f"training.learning_rate={_short(c.rate / factor)}",) if c.rate else ()


def _higher_rate(c: Curves, factor: float) -> tuple[str, ...]:
    return _lower_rate(c, 1 / factor)


def _short(value: float) -> str:
    """One digit and an exponent: `7e-5`."""
    digits, exponent = f"{value:.0e}".split("e")
    return f"{digits}e{int(exponent)}"


def _longer(c: Curves) -> tuple[str, ...]:
    if steps := number(c.setting("training.max_steps")):
        return (f"training.max_steps={2 * steps:.0f}",)
    epochs = number(c.setting("training.epochs"))
    return (f"training.epochs={2 * epochs:g}",) if epochs else ()


def _shorter(c: Curves, step: int) -> str:
    """To end about at that step, with the schedule fitted to it."""
    epochs, last = number(c.setting("training.epochs")), c.history.last_step
    if step and last and epochs and not c.setting("training.max_steps"):
        return f"training.epochs={float(f'{epochs * step / last:.2g}'):g}"
    return f"training.max_steps={step}" if step else _lower_rate(c, 3)[0] if c.rate else "training.learning_rate=1e-4"


def _larger_rank(c: Curves) -> tuple[str, ...]:
    r = number(c.setting("lora.r"))
    return tuple(f"lora.r={rank}" for rank in RANKS if r and rank > r)[:1]


def _smaller_rank(c: Curves) -> list[str]:
    r = number(c.setting("lora.r"))
    return [f"lora.r={int(r) // 2}"] if r and r >= 8 else []


def _more_targets(c: Curves) -> tuple[str, ...]:
    targets = c.setting("lora.targets")
    if targets == TARGETS[-1] or targets is None:
        return ()
    letters = set(targets) if isinstance(targets, str) else set()
    wider = next((wide for wide in TARGETS if letters and letters < set(wide)), TARGETS[-1])
    return (f"lora.targets={wider}",)


def _updates(record: Mapping[str, Any]) -> dict[str, float | None]:
    return {str(path): number(norm) for path, norm in _at(record, "adapter", "updates").items()}


def _count_of_kinds(updates: Mapping[str, float], kinds: Sequence[str]) -> int:
    return sum(path.rpartition(".")[2] in kinds for path in updates)


def _round_number(value: float) -> int:
    """1, 2 or 5 times a power of ten, the largest that is no larger."""
    power = 10 ** math.floor(math.log10(value))
    return int(next(factor * power for factor in (5, 2, 1) if factor * power <= value))


def _at(record: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """A block of the record; an empty one where it has none."""
    for key in path:
        record = record.get(key) if isinstance(record, Mapping) else None
    return record if isinstance(record, Mapping) else {}
