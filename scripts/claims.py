"""What is usually claimed of LoRA, beside what SmolLM2-135M shows on this machine, against full fine-tuning.

    python scripts/smollm2.py
    python scripts/claims.py --write       trains twice, measures, writes docs/claims.md: a quarter of an hour on two cores

Both are trained through `lora train` on the same rows in the same order. Steps and forwards
are timed in turn, by processor time of one thread. `--steps 4` tries the whole of it in a few minutes.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
from bench import Race, Result, processor, run
from bench_contestants import Setting
from bench_rows import even_lengths, rows_of

from lora_cli.budget.bases import measure_base
from lora_cli.budget.params import adapted_linears, budget_of
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.peft_format import load_adapter
from lora_cli.lora.switch import switch
from lora_cli.models.base import Base, resolve_base
from lora_cli.models.load import load_model, load_tokenizer
from lora_cli.recipe.schema import LoRA
from lora_cli.wording import bytes_text

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes/jargon/recipe.yaml"
BASE = ROOT / "models/SmolLM2-135M-Instruct.gguf"
PAGE = ROOT / "docs/claims.md"
# Full fine-tuning takes about a tenth of LoRA's rate; half of this one taught LoRA less in these few steps
RATES = {"lora": 1e-3, "full": 1e-4}
PROMPT, ANSWER = 128, 16  # tokens of a timed generation
TURNS = 6


class Run(NamedTuple):
    """What a run folder says."""

    folder: Path
    held_out: Mapping[int, float]  # loss by step
    parameters: Mapping[str, float]
    memory: float  # bytes of a step, measured

    @classmethod
    def of(cls, folder: Path) -> "Run":
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        losses = {event["step"]: event["loss"] for event in events if event["event"] == "evaluated"}
        memory = next(event["measured_bytes"] for event in events if event["event"] == "memory")
        return cls(folder, losses, json.loads((folder / "run.json").read_text())["parameters"], memory)


class Claim(NamedTuple):
    what: str
    usually: str  # with where it is said
    here: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=ROOT / "out/claims", help="runs that are there already are taken")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    runs = {method: train(asked.out / method, method, asked.steps) for method in RATES}
    merged = merge(runs["lora"].folder)
    timed = step_times()
    text = page(runs, timed, latencies(runs["lora"].folder, merged), switching(runs))
    print(text)
    if asked.write:
        PAGE.write_text(text, encoding="utf-8")
    return 0


def train(out: Path, method: str, steps: int) -> Run:
    """Nothing where the run is there already."""
    if not (out / "report.html").is_file() or not json.loads((out / "run.json").read_text()).get("proofs"):
        settings = {
            "training.method": method,
            "training.learning_rate": RATES[method],
            "training.max_steps": steps,
            "training.eval_steps": max(1, steps // 4),
            "training.save_steps": "null",
            "model.dtype": "float32",
            **({"lora.r": 8, "lora.targets": "all-linear"} if method == "full" else {}),  # as if left out
        }
        overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        lora("train", str(RECIPE), "--out", str(out), "--overwrite", *overrides)
    return Run.of(out)


def merge(adapter: Path) -> Path:
    out = adapter.with_name("merged")
    shutil.rmtree(out, ignore_errors=True)
    lora("merge", "--adapter", str(adapter), "--out", str(out), "--dtype", "float32")
    return out


def lora(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "lora_cli", *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def step_times() -> dict[str, Result]:
    """The same steps by both methods, in turn, each in a process of its own."""
    folder = resolve_base(str(BASE)).folder
    rows = rows_of(even_lengths(16, 128), load_tokenizer(folder))
    steps = [rows[i : i + 4] for i in range(0, 16, 4)]
    setting = Setting(folder, torch.float32, steps, size=4, packed=128, tokens=512)
    return run(Race("a step", setting, ("lora", "full")), threads=1)


def latencies(adapter: Path, merged: Path) -> dict[str, tuple[float, float]]:
    """Seconds to read a prompt and to write a token, of the base, of base + adapter, and of both merged, in turn."""
    base, folder = _loaded(resolve_base(str(BASE)).folder), load_adapter(adapter)
    models = {"base": base, "unmerged": base, "merged": _loaded(merged)}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    names = list(models)
    for turn in range(TURNS):
        for name in names[turn % 3 :] + names[: turn % 3]:  # whoever comes first finds the caches as others left them
            if models[name] is base:
                switch(base, folder if name == "unmerged" else None)
            taken[name].append(_generate(models[name]))
    return {name: tuple(map(min, zip(*times, strict=True))) for name, times in taken.items()}


def switching(runs: Mapping[str, Run]) -> dict[str, float]:
    """Seconds to the first token after changing what a resident base does, and after loading a model of its own instead."""
    base, folder = _loaded(resolve_base(str(BASE)).folder), runs["lora"].folder
    adapter = load_adapter(folder)

    def switched(found: Adapter) -> torch.nn.Module:
        switch(base, found)
        return base

    return {
        "from memory": _until_a_token(lambda: switched(adapter)),
        "from disk": _until_a_token(lambda: switched(load_adapter(folder))),
        "another model": _until_a_token(lambda: _loaded(runs["full"].folder)),
    }


def page(runs: Mapping[str, Run], timed: Mapping[str, Result], latency: Mapping, switched: Mapping) -> str:
    claims = "\n".join(f"| {c.what} | {c.usually} | {c.here} |" for c in claims_of(runs, timed, latency, switched))
    adapter, full = runs["lora"].held_out, runs["full"].held_out
    curves = "\n".join(f"| {step} | {loss:.4f} | {full[step]:.4f} |" for step, loss in adapter.items())
    return f"""# What is claimed of LoRA, and what was measured

Made by `python scripts/claims.py --write` on {date.today():%d %B %Y}: {processor()}, one thread, no GPU, torch {torch.__version__}.

SmolLM2-135M-Instruct on the Jargon File ([recipes/jargon](../recipes/jargon)), in float32: LoRA with r = 16 on all linear
layers against `training.method: full`, the same rows in the same order, {max(adapter)} steps of 8 rows, at learning rates of
{RATES["lora"]:g} and {RATES["full"]:g}: full fine-tuning takes about a tenth, and neither was searched any further. Sections are those of Hu et al. 2021, "LoRA: Low-Rank
Adaptation of Large Language Models". The paper's figures are of models a thousand times as large: what is saved grows
with the width, and so does the difference between what r = 16 trains and what there is.

| | usual claim | measured here |
| --- | --- | --- |
{claims}

## Held-out loss, nats a token

| step | LoRA | full fine-tuning |
| --- | --- | --- |
{curves}

One run each, 44 held-out rows: a difference of some hundredths says little. Times are processor time of runs in turn,
the least of {TURNS} for latencies, of which some per cent are noise; the memory of a step is the sum of live tensors at
its peak.
"""


def claims_of(runs: Mapping[str, Run], timed: Mapping[str, Result], latency: Mapping, switched: Mapping) -> list[Claim]:
    adapter, full = runs["lora"], runs["full"]
    trained, every = adapter.parameters["trainable"], full.parameters["trainable"]
    files = [_bytes(adapter.folder, "adapter_model*"), _bytes(full.folder, "model*.safetensors")]
    step = {name: result.step for name, result in timed.items()}
    end, base = max(adapter.held_out), adapter.held_out[0]
    gained = (base - adapter.held_out[end]) / (base - full.held_out[end])
    read, write = ({name: times[i] for name, times in latency.items()} for i in (0, 1))
    return [
        Claim(
            "trained parameters",
            "up to 10,000 times fewer (abstract: GPT-3 175B)",
            f"{trained:,} of {every:,}: {every / trained:.0f} times fewer; {_of_7B():,.0f} times for r = 8 on q and v of Llama-2-7B",
        ),
        Claim(
            "what is stored for a task",
            "350 GB become 35 MB (4.2)",
            f"{bytes_text(files[1])} become {bytes_text(files[0])}, both float32: {files[1] / files[0]:.0f} times less",
        ),
        Claim(
            "memory of a step",
            "down by up to two thirds (4.2), 3 times less (abstract)",
            f"{bytes_text(full.memory)} become {bytes_text(adapter.memory)}: {full.memory / adapter.memory:.1f} times less",
        ),
        Claim(
            "time of a step",
            "25 % faster on GPT-3 175B (4.2)",
            f"{step['full']:.2f} s become {step['lora']:.2f} s for 512 tokens: {step['full'] / step['lora'] - 1:.0%} faster",
        ),
        Claim(
            "quality",
            "on par or better (abstract, 5)",
            f"held-out loss {base:.3f} → {adapter.held_out[end]:.3f} by LoRA, {full.held_out[end]:.3f} by full fine-tuning: "
            f"{gained:.0%} of its gain",
        ),
        Claim(
            "latency, merged",
            "none added, by construction (4.1)",
            f"{_more(read, 'merged')} to read {PROMPT} tokens, {_more(write, 'merged')} to write one",
        ),
        Claim(
            "latency, not merged",
            "some, where tasks share a batch (4.2)",
            f"{_more(read, 'unmerged')} to read {PROMPT} tokens, {_more(write, 'unmerged')} to write one",
        ),
        Claim(
            "to switch tasks",
            "by swapping the LoRA weights alone (4.2)",
            f"{1000 * switched['from memory']:.0f} ms to the next token, {1000 * switched['from disk']:.0f} ms from disk; "
            f"{1000 * switched['another model']:,.0f} ms for another model, which stood in the page cache",
        ),
    ]


def _of_7B() -> float:
    """How many times fewer parameters the smallest usual adapter of a large model has."""
    shape = measure_base("Llama-2-7B").shape
    return shape.parameters / budget_of(adapted_linears(shape, "qv"), shape.parameters, LoRA(r=8).config()).trainable


def _more(times: Mapping[str, float], name: str) -> str:
    return f"{times[name] / times['base'] - 1:+.0%}"


@torch.inference_mode()
def _generate(model: torch.nn.Module) -> tuple[float, float]:
    """Seconds to read the prompt, and to write one token."""
    ids = torch.arange(PROMPT).unsqueeze(0) + 100
    began = time.process_time()
    found = model(ids, use_cache=True, logits_to_keep=1)
    read = time.process_time()
    for _ in range(ANSWER):
        ids = found.logits[:, -1:].argmax(-1)
        found = model(ids, past_key_values=found.past_key_values, use_cache=True)
    return read - began, (time.process_time() - read) / ANSWER


def _loaded(folder: Path) -> torch.nn.Module:
    return load_model(Base(str(folder), folder), dtype=torch.float32)


@torch.inference_mode()
def _until_a_token(ready: Callable[[], torch.nn.Module]) -> float:
    taken = []
    for _ in range(TURNS):
        began = time.process_time()
        ready()(torch.tensor([[100]]))  # a model that is mapped is read when it is asked
        taken.append(time.process_time() - began)
    return min(taken)


def _bytes(folder: Path, files: str) -> int:
    return sum(file.stat().st_size for file in folder.glob(files) if file.suffix == ".safetensors")


if __name__ == "__main__":
    sys.exit(main())
