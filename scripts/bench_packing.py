"""How much faster packed rows train than padded ones: the same steps of the same rows, three layouts, one process.

    python scripts/bench_packing.py recipes/jargon/recipe.yaml --mixed --steps 4 --threads 1

`--mixed` joins entries of the Jargon File into conversations of very different lengths, from some 50 to 2,000 tokens,
as chat data has them; without it, the rows are those of the recipe. Padded batches are what TRL and transformers make
by default: rows as they were shuffled, so many a batch, each padded to the longest.

Prints rows/s and trained tokens/s of processor time, which other work on the machine disturbs least, and the loss of
each layout, which must be the same.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from lora_cli.data.collate import collate
from lora_cli.data.order import epoch_length, plan, steps
from lora_cli.data.types import Batch, Example
from lora_cli.models.load import default_device
from lora_cli.objectives.sft import sft
from lora_cli.recipe.reader import LoadedRecipe, read_recipe
from lora_cli.runs.folder import RunFolder
from lora_cli.runs.train import Run, prepare
from lora_cli.train.layout import Layout, micro_batches
from lora_cli.train.task import to_device

ENTRIES = Path(__file__).resolve().parent.parent / "recipes/jargon/jargon.jsonl"
CHARACTERS = 100, 8000  # of a mixed row; four make a token
ROWS = 600
MAX_LENGTH = 2048
PADDED = "padded, as the rows come"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--mixed", action="store_true", help="rows of very different lengths")
    parser.add_argument("--steps", type=int, default=6, help="beside one that warms up")
    parser.add_argument(
        "--padded-size",
        type=int,
        default=4,
        help="rows of a padded batch; the default of transformers and TRL is 8, which takes twice the memory",
    )
    parser.add_argument("--threads", type=int, help="of torch; 1 makes processor time comparable")
    parser.add_argument("--set", action="append", default=[], help="overrides, as `lora train` takes them")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(_recipe(arguments, Path(folder)), RunFolder(Path("unused")))
        compare(run, arguments.steps, arguments.padded_size)


def _recipe(arguments: argparse.Namespace, folder: Path) -> LoadedRecipe:
    changes = list(arguments.set)
    if arguments.mixed:
        file = folder / "mixed.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in mixed()), encoding="utf-8")
        changes = [f"data.train={file}", "data.eval=null", f"data.max_length={MAX_LENGTH}", *changes]
    return read_recipe(arguments.recipe, changes)


def mixed() -> Iterator[dict]:
    """Conversations about entries that follow each other; the logarithms of their lengths are spread evenly."""
    draw, entries = random.Random(0), [json.loads(line) for line in ENTRIES.read_text(encoding="utf-8").splitlines()]
    least, most = CHARACTERS
    for _ in range(ROWS):
        wanted, size, turns = least * (most / least) ** draw.random(), 0, []
        place = draw.randrange(len(entries))
        while size < wanted:
            entry = entries[place % len(entries)]
            asked, said = f"Explain {entry['input']}.", entry["output"][: max(20, int(wanted - size))]
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            size, place = size + len(asked) + len(said), place + 1
        yield {"messages": turns}


def compare(run: Run, count: int, padded_size: int) -> None:
    size = run.recipe.training.global_batch_size
    planned = plan(epoch_length(run.rows.train), epochs=1, max_steps=count + 1, global_batch_size=size)
    layouts = {
        PADDED: lambda rows: in_order(rows, padded_size),
        "padded, by length": lambda rows: _batches(rows, Layout(padded_size)),
        "packed": lambda rows: _batches(rows, run.settings.layout),
    }
    seconds: dict[str, list[float]] = {name: [] for name in layouts}
    losses, filled = dict.fromkeys(layouts, 0.0), dict.fromkeys(layouts, 0)
    lengths, tokens_done = [], 0
    for number, rows in steps(run.rows.train, planned, seed=run.recipe.training.seed):
        for name, batches in layouts.items():  # in turn, so that a slow moment of the machine meets all of them
            made = batches(rows)
            began = time.process_time()
            loss = one_step(run.model, made)
            if number or not count:  # the first step warms up
                seconds[name].append(time.process_time() - began)
                losses[name] += loss
                filled[name] += sum(batch["input_ids"].numel() for batch in made)
        if number or not count:
            lengths += [len(row.input_ids) for row in rows]
            tokens_done += sum(weight > 0 for row in rows for weight in row.weights)
    print(
        f"{len(lengths)} rows of {min(lengths)} to {max(lengths)} tokens (half have at most "
        f"{statistics.median(lengths):.0f}), {tokens_done} trained tokens, steps of {size} rows on "
        f"{default_device().type}, {torch.get_num_threads()} threads; packed into rows of {run.settings.layout.row_length}"
    )
    for name, taken in seconds.items():
        whole, ratio = sum(taken), statistics.median(a / b for a, b in zip(seconds[PADDED], taken, strict=True))
        print(
            f"{name:<26} {sum(lengths) / filled[name]:4.0%} full  {len(lengths) / whole:6.3f} rows/s  "
            f"{tokens_done / whole:7.1f} trained tokens/s  {ratio:4.2f} ×  loss {losses[name] / tokens_done:.6f}"
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


def in_order(rows: list[Example], size: int) -> list[Batch]:
    """What most training loops do: rows as they were shuffled, each batch padded to its longest."""
    return [collate([[row] for row in rows[i : i + size]]) for i in range(0, len(rows), size)]


def _batches(rows: list[Example], layout: Layout) -> list[Batch]:
    return [batch for _, batch in micro_batches(rows, layout, rank=0, processes=1)]


if __name__ == "__main__":
    main()
