"""What it saves to train K adapters together: the same steps, K forwards one after another and one for all, in one process.

    python scripts/smollm2.py
    python scripts/bench_together.py recipes/jargon/recipe.yaml --grid lora.r=4,8,16,32 --steps 3

Prints seconds and processor seconds a step, peak memory of live tensors, and how far losses and gradients differ.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lora_cli.cli.console import bytes_text
from lora_cli.data.order import steps
from lora_cli.data.types import Batch
from lora_cli.lora.inject import lora_layers
from lora_cli.models.load import default_device
from lora_cli.objectives.sft import sft
from lora_cli.recipe.grid import grid, read_trials
from lora_cli.runs.parts import Run
from lora_cli.runs.sweep import planned, prepare_all, table_of
from lora_cli.train.layout import micro_batches
from lora_cli.train.meter import measured
from lora_cli.train.task import Learning, Task
from lora_cli.train.together import Table, Wanted

SEED = 1  # of dropout
WAYS = ("one after another", "together")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--grid", action="append", required=True, metavar="KEY=V1,V2")
    parser.add_argument("--set", action="append", default=[], help="overrides, as `lora train` takes them")
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    trials = grid(arguments.grid)
    runs = prepare_all(planned(Path("unused"), trials, read_trials(arguments.recipe, arguments.set, trials)))
    for layer in (layer for run in runs for layer in lora_layers(run.model).values()):
        torch.nn.init.normal_(layer.lora_B, std=0.01)  # as after some steps: at zero, A has no gradient
    table, alone = table_of(runs), [Learning(Task(run.model, sft).train(), run.accelerator) for run in runs]
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    differences = [0.0, 0.0]
    for number in range(arguments.steps + 1):
        batches = [first_batch(run, number) for run in runs]
        found = {}
        for way in WAYS[:: 1 if number % 2 else -1]:  # in turn, so that a slow moment meets both
            began = time.perf_counter(), time.process_time()
            losses = _step(way, alone, table, batches)
            ended = time.perf_counter(), time.process_time()
            found[way] = losses, [_gradients(run) for run in runs]
            if number:  # the first step warms up
                taken[way].append((ended[0] - began[0], ended[1] - began[1]))
        differences = torch.tensor([differences, _differences(found)], dtype=torch.float64).amax(dim=0).tolist()
    _tell(runs, batches, taken, differences)
    _tell_memory(runs, alone, table, batches)


def first_batch(run: Run, number: int) -> Batch:
    """The first forward of a step of a run."""
    _, rows = next(steps(run.rows.train, run.plan, seed=run.recipe.training.seed, start=number))
    return micro_batches(rows, run.settings.layout, rank=0, processes=1)[0][1]


def _step(way: str, alone: Sequence[Learning], table: Table, batches: Sequence[Batch]) -> list[float]:
    items = [float(batch["weights"].sum()) for batch in batches]
    if way == "together":
        wanted = {i: Wanted(batch, items[i], SEED) for i, batch in enumerate(batches)}
        losses = list(table.answers(wanted).values())
    else:
        losses = [learn(batch, items[i], SEED) for i, (learn, batch) in enumerate(zip(alone, batches, strict=True))]
    return [loss.total.item() / count for loss, count in zip(losses, items, strict=True)]


def _gradients(run: Run) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    run.model.zero_grad()
    return found


def _differences(found: dict) -> tuple[float, float]:
    """The largest of losses, and of gradients: difference ÷ largest entry of the tensor."""
    (losses, gradients), (others, theirs) = found.values()
    loss = max(abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True))
    pairs = [(run[name], their[name]) for run, their in zip(gradients, theirs, strict=True) for name in their]
    # a maximum of torch's, which is not a number where any is not: Python's would pass it by
    return loss, torch.stack([(a - b).abs().max() / b.abs().max().clamp(min=1e-30) for a, b in pairs]).max().item()


def _tell(runs: Sequence[Run], batches: Sequence[Batch], taken: dict, differences: Sequence[float]) -> None:
    shapes = ", ".join(sorted({" × ".join(map(str, batch["input_ids"].shape)) for batch in batches}))
    print(
        f"{len(runs)} runs on {default_device().type}, {torch.get_num_threads()} threads, forwards of {shapes} tokens"
    )
    for way, times in taken.items():
        wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"{way:<18} {wall:8.2f} s a step of all runs   {cpu:8.2f} s of processor time")
    ratios = [[a[i] / b[i] for a, b in zip(*taken.values(), strict=True)] for i in (0, 1)]
    print(
        f"together is {statistics.median(ratios[0]):.2f} × as fast ({statistics.median(ratios[1]):.2f} × by processor time)"
    )
    print(
        f"largest difference: losses {differences[0]:.1e}, gradients {differences[1]:.1e} of a tensor's largest entry"
    )


def _tell_memory(runs: Sequence[Run], alone: Sequence[Learning], table: Table, batches: Sequence[Batch]) -> None:
    """Of live tensors: weights, adapters and one forward and backward, without the optimizers, which are the same."""
    device = default_device()
    with measured(device, [*runs[0].model.parameters(), *runs[0].model.buffers()]) as one:
        _step(WAYS[0], alone[:1], table, batches[:1])
    held = {id(t): t for run in runs for t in [*run.model.parameters(), *run.model.buffers()]}
    with measured(device, held.values()) as joint:
        _step(WAYS[1], alone, table, batches)
    ratio = len(runs) * one.bytes / joint.bytes
    print(
        f"peak memory: a run by itself {bytes_text(one.bytes)}, {len(runs)} processes {bytes_text(len(runs) * one.bytes)}, "
        f"together {bytes_text(joint.bytes)}: {ratio:.2f} × less"
    )


if __name__ == "__main__":
    main()
