"""events.jsonl as curves: read as far as it goes, whichever version wrote it and however the run ended.

What is no event is counted and passed over; events and keys that are not known are kept. What a resumed run did again
takes the place of what it had done before.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Event = Mapping[str, Any]
Curve = list[tuple[int, float]]

MOST_BYTES = 2_000_000  # of one line; no event has so many
LAST_STEP = 10**9
INTERRUPTED, BROKEN_OFF = "interrupted", "broken off"  # the reason of an end before the end
# Of an evaluation, what is no metric besides the loss
NO_METRIC = {"step", "loss", "perplexity", "tokens", "seconds", "rows"}


@dataclass
class History:
    """Steps, evaluations and samples in order, each step once; `others` holds the events of other names."""

    steps: list[Event] = field(default_factory=list)
    evaluations: list[Event] = field(default_factory=list)
    samples: list[Event] = field(default_factory=list)
    others: list[Event] = field(default_factory=list)
    damaged: int = 0  # lines that are no event

    @property
    def finished(self) -> Event | None:
        """The end of the run; None for one that was stopped before it, or goes on."""
        return self.others[-1] if self.others and self.others[-1]["event"] == "finished" else None

    @property
    def planned_steps(self) -> int | None:
        return next((int(e["steps"]) for e in reversed(self.named("started")) if number(e.get("steps"))), None)

    @property
    def last_step(self) -> int:
        return max((event["step"] for event in [*self.steps, *self.evaluations]), default=0)

    def named(self, name: str) -> list[Event]:
        return [event for event in self.others if event["event"] == name]

    def curve(self, key: str) -> Curve:
        """(step, value) of every step that has a finite one."""
        return curve(self.steps, key)

    def evaluated(self, key: str = "loss") -> Curve:
        return curve(self.evaluations, key)

    def metrics(self) -> list[str]:
        """What evaluations measure besides the loss."""
        names = dict.fromkeys(key for event in self.evaluations for key in event if key not in NO_METRIC)
        return [name for name in names if self.evaluated(name)]

    def sources(self) -> dict[str, Curve]:
        """The training loss of each source, where steps tell them apart."""
        found: dict[str, Curve] = {}
        for event in self.steps:
            parts = event.get("sources")
            for name, value in parts.items() if isinstance(parts, Mapping) else ():
                loss = number(value.get("loss") if isinstance(value, Mapping) else value)
                if loss is not None:
                    found.setdefault(str(name), []).append((event["step"], loss))
        return found


def read_history(file: Path) -> History:
    """The history of a run; an empty one where there is no file."""
    if not file.is_file():
        return History()
    with file.open("rb") as lines:
        return history_of(map(_event, lines))


def history_of(events: Iterable[Event | None]) -> History:
    """The history of events in the order in which they happened; None is a line that is none."""
    history = History()
    steps: dict[int, Event] = {}
    evaluations: dict[int, Event] = {}
    samples: dict[int, Event] = {}
    for event in events:
        if event is None:
            history.damaged += 1
            continue
        match event["event"]:
            case "step":
                steps[event["step"]] = event
            case "evaluated":
                evaluations[event["step"]] = event
            case "sampled":
                samples[event["step"]] = event
            case name:
                if name == "started":  # what lies behind its step is done again
                    for kept in (steps, evaluations, samples):
                        for step in [step for step in kept if step > event["step"]]:
                            del kept[step]
                history.others.append(event)
    history.steps, history.evaluations, history.samples = map(_in_order, (steps, evaluations, samples))
    return history


def curve(events: Sequence[Event], key: str) -> Curve:
    return [(event["step"], value) for event in events if (value := number(event.get(key))) is not None]


def number(value: Any) -> float | None:
    """The value if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _event(line: bytes) -> Event | None:
    try:
        found = json.loads(line) if len(line) <= MOST_BYTES else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("event"), str):
        return None
    step = found.setdefault("step", 0)
    return found if type(step) is int and 0 <= step <= LAST_STEP else None


def _in_order(events: Mapping[int, Event]) -> list[Event]:
    return [events[step] for step in sorted(events)]
