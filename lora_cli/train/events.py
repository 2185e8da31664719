"""What happens in a run, as values. The loop yields them; console, events.jsonl and trackers consume them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Event:
    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    def as_json(self) -> dict:
        return {"event": self.name, **{key: value for key, value in asdict(self).items() if value != {}}}


@dataclass(frozen=True)
class Started(Event):
    """Before the first step: `step` is 0, or the step that a resumed run continues from."""

    step: int
    steps: int
    rows: int
    parameters: int  # trainable
    micro_batch_size: int
    processes: int
    gradient_checkpointing: str | bool | int  # as a recipe writes it
    predicted_bytes: int | None  # the peak of a step; None for a base without a formula


@dataclass(frozen=True)
class Memory(Event):
    """What a step needed at its peak, beside what was predicted for its batches. Measured once a session."""

    step: int
    predicted_bytes: int
    measured_bytes: int


@dataclass(frozen=True)
class Relaid(Event):
    """What was measured is so far from what was predicted that the steps behind this one are made otherwise."""

    step: int
    factor: float  # what comes and goes in a step: measured ÷ predicted
    micro_batch_size: int
    row_length: int | None  # tokens of a packed row
    gradient_checkpointing: str | bool | int  # as a recipe writes it


@dataclass(frozen=True)
class Resumed(Event):
    """A run goes on from the checkpoint of `step`; what it had logged behind it is dropped, for it comes again."""

    step: int
    changed: Mapping[str, tuple]  # what is not as it was, by key: (then, now)


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
    peak_bytes: int  # the most memory so far in this session: of the device, or of the first process on a CPU
    sources: Mapping[str, float] = field(default_factory=dict)  # the mean loss of each, where there are several


@dataclass(frozen=True)
class Skipped(Event):
    """A step whose update was not applied, why, and the rows that may be the cause."""

    step: int
    reason: str
    rows: str
    skipped: int  # such steps so far
    rewound_to: int | None = None  # the step whose weights were put back


@dataclass(frozen=True)
class Spike(Event):
    """A step that was applied, though its gradient is far larger than those before it."""

    step: int
    grad_norm: float
    median: float
    rows: str


@dataclass(frozen=True)
class OutOfMemory(Event):
    """Memory ran out in this step, which is taken again with these, smaller, forwards: at once, or by a session that
    starts again from the last saved step."""

    step: int
    rank: int
    micro_batch_size: int
    row_length: int | None  # tokens of a packed row

    @property
    def name(self) -> str:
        return "out_of_memory"


@dataclass(frozen=True)
class Evaluated(Event):
    """Held-out rows: the mean loss over their trained tokens, in nats."""

    step: int
    loss: float
    perplexity: float
    tokens: int
    best: bool  # the lowest loss so far
    sources: Mapping[str, float] = field(default_factory=dict)  # the mean loss of each, where there are several
    metrics: Mapping[str, float] = field(default_factory=dict)  # what the objective measures instead of the perplexity

    def as_json(self) -> dict:
        """The metrics stand beside the loss, where the perplexity is of other objectives."""
        found = super().as_json()
        metrics = found.pop("metrics", {})
        return {key: value for key, value in found.items() if not (metrics and key == "perplexity")} | metrics


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
class Interrupted(Event):
    """A signal ended this session; `saved` is the step that the run continues from, 0 where it has to begin anew."""

    step: int
    saved: int


@dataclass(frozen=True)
class Complete(Event):
    """There was nothing to resume: the run had finished, and nothing has changed since."""

    step: int


@dataclass(frozen=True)
class Finished(Event):
    """The end of a run and why: `all steps`, `early stopping` or `max_time`."""

    step: int
    reason: str
    seconds: float
    peak_bytes: int
    adapter_step: int  # the step whose adapter is the result: the last, or with `keep_best` the best
