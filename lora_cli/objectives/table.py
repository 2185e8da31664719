"""The objectives by the name a recipe gives them."""

from lora_cli.objectives.base import Objective
from lora_cli.objectives.sft import sft

OBJECTIVES: dict[str, Objective] = {"sft": sft}
