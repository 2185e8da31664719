"""Curves as SVG paths: scales with even ticks, and lines thinned to what a screen can show.

A plot is a square of SIZE × SIZE that the page stretches; strokes keep their width and labels are no part of it. So
ticks lie evenly, from edge to edge.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from lora_cli.runs.diagnosis import smoothed
from lora_cli.runs.history import Curve, History
from lora_cli.wording import compact, power

SIZE = 1000
MOST_POINTS = 400  # of a line; more are thinned to the extremes of each stretch
TICKS = 4  # stretches between ticks, about
SMOOTHED = 20  # a curve of fewer points is not smoothed
WIDE = 40  # times the smallest value: from there on, a scale is logarithmic
OUTLIERS = 0.02  # share of the raw values that may leave the plot

Format = Callable[[float], str]


@dataclass(frozen=True)
class Line:
    """`look` is its class on the page: a colour, and `raw`, `dots` or nothing for a plain line."""

    name: str
    look: str
    points: Curve
    path: str = ""


@dataclass(frozen=True)
class Chart:
    """`y_labels` from the top down, `x_labels` from left to right; `summary` says in words what is to be seen."""

    title: str
    note: str
    lines: tuple[Line, ...]
    grid: str
    y_labels: tuple[str, ...]
    x_labels: tuple[str, ...]
    summary: str
    last: int  # the step at the right edge
    digits: int  # significant ones of a value that is read off


def charts_of(history: History) -> list[Chart]:
    """The charts that the events allow, the loss first."""
    steps = partial(chart, last=history.last_step)
    losses = curve_lines("training", "train", history.curve("loss"))
    losses += [
        Line("held out", "held-out dots", history.evaluated()),
        Line("held out", "held-out", history.evaluated()),
    ]
    sources = [
        Line(name, f"c{place % 6}", curve_lines("", "", points)[-1].points)
        for place, (name, points) in enumerate(history.sources().items())
    ]
    found = [
        steps("Loss", "nats a token", losses, format=compact, wide=True),
        steps("Loss by source", "nats a token", sources if len(sources) > 1 else [], format=compact),
        *(
            steps(name, "held-out rows", _with_dots(name, history.evaluated(name)), format=compact)
            for name in history.metrics()
        ),
        steps("Learning rate", "", [Line("rate", "train", history.curve("lr"))], format=power, digits=3),
        steps(
            "Gradient norm",
            "before clipping",
            curve_lines("norm", "train", history.curve("grad_norm")),
            format=compact,
            wide=True,
        ),
        steps(
            "Throughput",
            "tokens a second",
            curve_lines("tokens a second", "train", history.curve("tokens_per_second")),
            format=compact,
        ),
        steps("Memory", "GB, the most so far", [Line("peak", "train", _memory(history))], format=compact),
    ]
    return [each for each in found if each]


def chart(
    title: str, note: str, lines: Sequence[Line], *, last: int, format: Format, digits: int = 4, wide: bool = False
) -> Chart | None:
    """None where no line has a point. `wide` figures, which may span decades, are drawn by their logarithm if they do."""
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    scale, ticks = _scale(lines, wide)
    last = max(last, 1)
    low, high = scale(ticks[0]), scale(ticks[-1])
    drawn = [_drawn(line, last, lambda value: (high - scale(value)) / (high - low)) for line in lines]
    rows = [round(SIZE * place / (len(ticks) - 1)) for place in range(len(ticks))]
    return Chart(
        title=title,
        note=note,
        lines=tuple(drawn),
        grid="".join(f"M0 {y}H{SIZE}" for y in rows),
        y_labels=tuple(format(tick) for tick in reversed(ticks)),
        x_labels=_x_labels(last),
        summary=f"{title}: " + "; ".join(_in_words(line, format) for line in lines if "raw" not in line.look),
        last=last,
        digits=digits,
    )


def curve_lines(name: str, look: str, points: Curve) -> list[Line]:
    """The curve itself, pale, and a smoothed one over it; the curve alone where it is short."""
    if len(points) < SMOOTHED:
        return [Line(name, look, points)]
    smooth = points
    for _ in range(2):  # twice a mean over a window is one that weighs by nearness
        means = smoothed(smooth, max(5, len(points) // 25))
        smooth = [(step, value) for (step, _), value in zip(points, means, strict=True)]
    return [Line(f"{name}, each step", f"{look} raw", points), Line(name, look, smooth)]


def ticks_of(low: float, high: float) -> list[float]:
    """Round numbers at even distances that hold `low` and `high`."""
    span = high - low or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / TICKS))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor * TICKS >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return [step * place for place in range(first, last + 1)]


def _scale(lines: Sequence[Line], wide: bool) -> tuple[Callable[[float], float], list[float]]:
    """Straight or logarithmic, with its ticks. Single values of a raw curve may leave the plot."""
    values = [value for line in lines for value in _within(line)]
    low, high = min(values), max(values)
    if wide and low > 0 and high / low > WIDE:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return lambda value: math.log10(max(value, 1e-300)), [10.0**power for power in powers]
    if low >= 0 and low < 0.35 * high:
        low = 0.0
    return lambda value: value, ticks_of(low, high)


def _within(line: Line) -> list[float]:
    values = sorted(value for _, value in line.points)
    cut = int(OUTLIERS * len(values)) if "raw" in line.look else 0
    return values[cut : len(values) - cut]


def _drawn(line: Line, last: int, height: Callable[[float], float]) -> Line:
    points = _thinned(line.points)
    places = [(round(SIZE * step / last), round(min(max(height(value), 0), 1) * SIZE)) for step, value in points]
    if "dots" in line.look:
        path = "".join(f"M{x} {y}h0" for x, y in places)
    else:
        path = "M" + "L".join(f"{x} {y}" for x, y in places)
        path += "h0" if len(places) == 1 else ""
    return Line(line.name, line.look, points, path)


def _thinned(points: Curve) -> Curve:
    """The lowest and the highest point of each stretch, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / MOST_POINTS)
    kept: Curve = []
    for i in range(0, len(points), size):
        stretch = points[i : i + size]
        ends = (min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1]))
        kept += sorted(set(ends))
    return kept


def _x_labels(last: int) -> tuple[str, ...]:
    parts = next((parts for parts in (4, 5, 3, 2) if last % parts == 0), 1) if last > 1 else 1
    return tuple(f"{last * place // parts:,}" for place in range(parts + 1))


def _in_words(line: Line, format: Format) -> str:
    (_, first), (_, last) = line.points[0], line.points[-1]
    low = min(value for _, value in line.points)
    high = max(value for _, value in line.points)
    return f"{line.name} from {format(first)} to {format(last)}, between {format(low)} and {format(high)}"


def _with_dots(name: str, points: Curve) -> list[Line]:
    return [Line(name, "held-out dots", points), Line(name, "held-out", points)]


def _memory(history: History) -> Curve:
    """The most that was in use up to each step; less again only where another session has begun."""
    return [(step, peak / 1e9) for step, peak in history.curve("peak_bytes")]
