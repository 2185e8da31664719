"""The objectives by the name a recipe gives them, and what held-out rows are measured by beside the loss."""

from lora_cli.objectives.base import Each, Measure, Objective
from lora_cli.objectives.classify import accuracy_and_f1, classify, classify_each
from lora_cli.objectives.sft import sft, sft_each

OBJECTIVES: dict[str, Objective] = {"sft": sft, "classify": classify}
EACH: dict[str, Each] = {"sft": sft_each, "classify": classify_each}  # of runs that share a forward
MEASURES: dict[str, Measure] = {"classify": accuracy_and_f1}  # of the sums of their metrics; others have none
