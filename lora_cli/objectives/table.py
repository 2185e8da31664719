"""The objectives by the name a recipe gives them, and what held-out rows are measured by beside the loss."""

from lora_cli.objectives.base import Measure, Objective
from lora_cli.objectives.classify import accuracy_and_f1, classify
from lora_cli.objectives.sft import sft

OBJECTIVES: dict[str, Objective] = {"sft": sft, "classify": classify}
MEASURES: dict[str, Measure] = {"classify": accuracy_and_f1}  # of the sums of their metrics; others have none
