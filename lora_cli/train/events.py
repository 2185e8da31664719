"""What happens in a run, as values. The loop yields them; console, events.jsonl and trackers consume them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Event:
    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    def as_json(self) -> dict:
        return {"event": self.name, **asdict(self)}


@dataclass(frozen=True)
class Started(Event):
    """Before the first step: `step` is 0, or the step that a resumed run continues from."""

    step: int
    steps: int
    rows: int
    parameters: int  # trainable
    micro_batch_size: int
    processes: int


@dataclass(frozen=True)
class Step(Event):
    """One optimizer step. `loss` is the mean over its trained tokens on all devices, in nats."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int  # trained tokens so far, over the whole run
    tokens_per_second: float  # all tokens of this step, trained or read
    seconds: float  # since the run began


@dataclass(frozen=True)
class Evaluated(Event):
    """Held-out rows: the mean loss over their trained tokens, in nats."""

    step: int
    loss: float
    perplexity: float
    tokens: int
    best: bool  # the lowest loss so far


@dataclass(frozen=True)
class Sampled(Event):
    """What the model answers to the recipe's `sample_prompts` at this step."""

    step: int
    samples: Mapping[str, str]


@dataclass(frozen=True)
class Saved(Event):
    step: int
    folder: str


@dataclass(frozen=True)
class Finished(Event):
    """The end of a run and why: `all steps`, `early stopping` or `max_time`."""

    step: int
    reason: str
    seconds: float
    peak_bytes: int
