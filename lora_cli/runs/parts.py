"""Everything a run consists of, as values: what `prepare` makes and the other steps read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from lora_cli.budget.params import Budget
from lora_cli.data.examples import Examples
from lora_cli.data.order import Plan
from lora_cli.data.report import DataReport
from lora_cli.data.types import Example
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.base_files import Fingerprint
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.identity import TokenizerFingerprint
from lora_cli.lora.tuned import Tuned
from lora_cli.models.base import Base
from lora_cli.recipe.reader import LoadedRecipe
from lora_cli.recipe.schema import Recipe
from lora_cli.runs.decision import Decision
from lora_cli.runs.folder import RunFolder
from lora_cli.train.checkpoint import Learned
from lora_cli.train.loop import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rows:
    """The examples of a run, and what became of the rows they were made from."""

    train: Sequence[Example]
    held_out: Sequence[Example]
    report: DataReport
    held_out_report: DataReport | None  # None where the held-out rows are a share of the training rows

    @property
    def labels(self) -> tuple[str, ...]:
        """What rows are classified as, in the order of the head's outputs; none where nothing is classified."""
        return tuple(self.report.labels)

    @cached_property
    def all(self) -> Examples:
        """Those that are trained on, and the held-out ones behind them."""
        return Examples.of(self.train) + Examples.of(self.held_out)


@dataclass(frozen=True)
class Run:
    """Everything a run consists of, before its first step."""

    loaded: LoadedRecipe
    folder: RunFolder
    base: Base
    fingerprint: Fingerprint
    tokens: TokenizerFingerprint
    tokenizer: "PreTrainedTokenizerBase"
    rows: Rows
    model: "PreTrainedModel"
    config: LoRAConfig | None  # None where every weight is trained
    transposed: bool
    budget: Budget
    plan: Plan
    settings: Settings
    decision: Decision
    dtype: torch.dtype
    accelerator: Accelerator
    frozen: str  # digest of the base, to prove that training left it alone; or, where every weight is trained, that it did not
    start: Adapter | None = None  # of an adapter that completes a quantised base: taken off on any other

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    def learned(self) -> Learned:
        """A copy of what the model has learned so far."""
        if self.config is None:
            return Tuned.of(self.model)
        found = Adapter.of(self.model, self.config, self.fingerprint, self.rows.labels, self.tokens)
        return replace(found, completes=self.recipe.model.quantize) if self.start else found
