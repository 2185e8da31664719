"""Where a run stands: what a checkpoint has to remember beside adapter and optimizer."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from lora_cli.models.recompute import Recompute
from lora_cli.train.layout import Layout


@dataclass
class Progress:
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None  # the lowest held-out loss, that of the base before the first step among them
    evaluations_without_gain: int = 0
    measured: int | None = None  # the last step that was evaluated
    kept_step: int | None = None  # the step after which the held-out loss was lowest, and that loss
    kept_loss: float | None = None
    layout: Layout | None = None  # as the forwards are now: smaller than the recipe's where memory was short
    # what is computed again, where a measured step has shown that another way is better
    recompute: Recompute | None = None
    factor: float | None = None  # what comes and goes in a step, measured ÷ predicted; None: no step was measured yet
    fitted: int = 0  # tokens of the largest forward so far
    skipped: list[int] = field(default_factory=list)  # the latest steps whose update was not applied
    grad_norms: list[float] = field(default_factory=list)  # of the latest steps, before clipping

    def as_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping) -> "Progress":
        layout = found.get("layout")
        return cls(**(dict(found) | {"layout": layout and Layout(**layout)}))
