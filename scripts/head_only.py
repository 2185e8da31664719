"""How far a classifier gets when its head alone is trained: what the LoRA layers of a recipe are worth.

    python scripts/head_only.py recipes/wordnet-classes/recipe.yaml [lora.r=16 …]

The same recipe, rows, order, head and steps as `lora train`; only A and B stand still, with B at zero.
"""

import sys
import tempfile
from pathlib import Path

from lora_cli.lora.inject import lora_layers
from lora_cli.recipe.reader import read_recipe
from lora_cli.runs.folder import RunFolder
from lora_cli.runs.train import execute, prepare
from lora_cli.train.events import Evaluated, Step


def main(recipe: str, overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = RunFolder(Path(temporary))
        folder.checkpoints.mkdir()
        run = prepare(read_recipe(recipe, overrides), folder)
        for layer in lora_layers(run.model).values():
            layer.requires_grad_(False)
        trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
        print(f"the head alone: {trained:,} parameters, {run.plan.steps} steps")
        for event in execute(run):
            match event:
                case Evaluated():
                    figures = "  ".join(f"{name} {value:.4f}" for name, value in event.metrics.items())
                    print(f"step {event.step:>4}  held-out loss {event.loss:.4f}  {figures}", flush=True)
                case Step(step=number) if number % 10 == 0:
                    print(f"step {number:>4}  loss {event.loss:.4f}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
