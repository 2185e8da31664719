"""How much faster packed rows train than padded ones: the same steps of a recipe's rows, three layouts, one process.

    python scripts/bench_packing.py recipes/jargon/recipe.yaml --steps 6

Prints rows/s and trained tokens/s, and the loss of each layout, which must be the same.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from lora_cli.data.collate import collate
from lora_cli.data.order import epoch_length, plan, steps
from lora_cli.data.types import Batch, Example
from lora_cli.models.load import default_device
from lora_cli.objectives.sft import sft
from lora_cli.recipe.reader import read_recipe
from lora_cli.runs.folder import RunFolder
from lora_cli.runs.train import prepare
from lora_cli.train.layout import Layout, micro_batches
from lora_cli.train.loop import to_device

PADDED_SIZE = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--set", action="append", default=[], help="overrides, as `lora train` takes them")
    arguments = parser.parse_args()
    run = prepare(read_recipe(arguments.recipe, arguments.set), RunFolder(Path("unused")))
    size = run.recipe.training.global_batch_size
    planned = plan(epoch_length(run.rows.train), epochs=1, max_steps=arguments.steps + 1, global_batch_size=size)
    layouts = {
        "padded, as the rows come": in_order,
        "padded, by length": lambda rows: _batches(rows, Layout(PADDED_SIZE)),
        "packed": lambda rows: _batches(rows, run.settings.layout),
    }
    seconds: dict[str, list[float]] = {name: [] for name in layouts}
    losses = dict.fromkeys(layouts, 0.0)
    rows_done = tokens_done = 0
    for number, rows in steps(run.rows.train, planned, seed=run.recipe.training.seed):
        for name, batches in layouts.items():  # in turn, so that a slow moment of the machine meets all of them
            began = time.perf_counter()
            loss = one_step(run.model, batches(rows))
            if number:  # the first step warms up
                seconds[name].append(time.perf_counter() - began)
                losses[name] += loss
        rows_done += len(rows) * bool(number)
        tokens_done += sum(weight > 0 for row in rows for weight in row.weights) * bool(number)
    print(f"{rows_done} rows, {tokens_done} trained tokens, steps of {size} rows on {default_device().type}")
    for name, taken in seconds.items():
        whole, ratio = sum(taken), _ratio(seconds["padded, as the rows come"], taken)
        print(
            f"{name:<26} {rows_done / whole:6.2f} rows/s  {tokens_done / whole:7.1f} trained tokens/s  "
            f"{ratio:4.2f} ×  loss {losses[name] / tokens_done:.6f}"
        )


def one_step(model: torch.nn.Module, batches: list[Batch]) -> float:
    """Forward and backward of a step; the sum of its loss."""
    total = 0.0
    for batch in batches:
        loss = sft(model, to_device(batch, model.device)).total
        loss.backward()
        total += loss.item()
    model.zero_grad()
    return total


def in_order(rows: list[Example]) -> list[Batch]:
    """What most training loops do: rows as they were shuffled, each batch padded to its longest."""
    return [collate([[row] for row in rows[i : i + PADDED_SIZE]]) for i in range(0, len(rows), PADDED_SIZE)]


def _batches(rows: list[Example], layout: Layout) -> list[Batch]:
    return [batch for _, batch in micro_batches(rows, layout, rank=0, processes=1)]


def _ratio(base: list[float], taken: list[float]) -> float:
    """The median over the steps, pair by pair."""
    return statistics.median(a / b for a, b in zip(base, taken, strict=True))


if __name__ == "__main__":
    main()
