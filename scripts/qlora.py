"""QLoRA on a real model: the same short run over nf4, bfloat16 and float32, side by side, and nf4 merged in two ways.

    python scripts/smollm2.py                     puts SmolLM2 in its place
    python scripts/qlora.py --steps 40            trains three times, prints the curves, the memory and the merges

Rows, seed, order and start are the same, so that what differs is the base's storage alone.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes/jargon/recipe.yaml"
RUNS = {
    "float32": ["model.dtype=float32"],
    "bfloat16": ["model.dtype=bfloat16"],
    "nf4": ["model.dtype=float32", "model.quantize=nf4"],
}
GRIDS = ("original", "nf4")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for all runs")
    parser.add_argument("--out", type=Path, default=ROOT / "out/qlora")
    asked = parser.parse_args()
    for name, settings in RUNS.items():
        train(asked.out / name, [*settings, f"training.max_steps={asked.steps}", *asked.set])
    runs = {name: events_of(asked.out / name) for name in RUNS}
    print(curves(runs, every=max(1, asked.steps // 8)))
    print(memory(runs))
    print(merges(asked.out / "nf4"))
    return 0


def train(out: Path, settings: list[str]) -> None:
    """Nothing where the run is there already."""
    if not (out / "adapter_model.safetensors").is_file():
        overrides = [word for setting in settings for word in ("--set", setting)]
        lora("train", str(RECIPE), "--out", str(out), *overrides)


def lora(*words: str) -> str:
    command = [sys.executable, "-m", "lora_cli", *words]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def events_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def curves(runs: dict[str, list[dict]], every: int) -> str:
    """The loss of a step, averaged over `every` steps, and the held-out loss before and after."""
    steps = {name: [e["loss"] for e in events if e["event"] == "step"] for name, events in runs.items()}
    lines = [row("steps", *runs)]
    for start in range(0, min(map(len, steps.values())), every):
        means = [sum(losses[start : start + every]) / len(losses[start : start + every]) for losses in steps.values()]
        lines.append(row(f"{start + 1}–{start + every}", *(f"{mean:.4f}" for mean in means)))
    held_out = [[e["loss"] for e in events if e["event"] == "evaluated"] for events in runs.values()]
    lines.append(row("held out, before", *(f"{losses[0]:.4f}" for losses in held_out)))
    lines.append(row("held out, after", *(f"{losses[-1]:.4f}" for losses in held_out)))
    return "\n".join(lines) + "\n"


def memory(runs: dict[str, list[dict]]) -> str:
    """Of one step, as planned from shapes and as measured in live tensors."""
    found = [next(e for e in events if e["event"] == "memory") for events in runs.values()]
    return "\n".join(
        [
            row("step, planned", *(f"{e['predicted_bytes'] / 1e9:.2f} GB" for e in found)),
            row("step, measured", *(f"{e['measured_bytes'] / 1e9:.2f} GB" for e in found)),
        ]
    )


def merges(run: Path) -> str:
    lines = [""]
    for grid in GRIDS:
        out = run.with_name(f"merged-{grid}")
        shutil.rmtree(out, ignore_errors=True)
        lines.append(lora("merge", "--adapter", str(run), "--base-grid", grid, "--out", str(out)))
    return "\n".join(lines)


def row(*cells: str) -> str:
    return f"{cells[0]:<18}" + "".join(f"{cell:>12}" for cell in cells[1:])


if __name__ == "__main__":
    sys.exit(main())
