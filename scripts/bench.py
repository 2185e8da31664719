"""How fast a LoRA step is, here and in the libraries that are installed: the same rows, the same losses, one after the other.

    python scripts/smollm2.py
    python scripts/bench.py --quick         some minutes on two cores
    python scripts/bench.py --write         the whole of it, a quarter of an hour, and its tables into README.md
    python scripts/bench.py --gpu           Llama's 1B and 8B shapes with random weights, on a GPU

Each contestant has a process of its own, which is where its memory is measured. On a CPU they take turns, step by step,
so that a slow moment of the machine meets all of them, and what counts is processor time; on a GPU one runs after the
other. The floor is the step's floating-point operations (a frozen weight has no gradient, padding is no work) at the
rate of the fastest matrix product that this machine makes. Exits with 1 where losses differ.
"""

import argparse
import platform
import re
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from bench_contestants import CONTESTANTS, PROJECTIONS, R, Setting, padded, work
from bench_rows import even_lengths, mixed_lengths, random_rows, rows_of

from lora_cli.budget.activations import How
from lora_cli.budget.catalogue import CATALOGUE
from lora_cli.budget.params import adapted_linears
from lora_cli.budget.shapes import shape_of
from lora_cli.budget.speed import operations
from lora_cli.budget.step import Batch, Setup
from lora_cli.data.types import Example
from lora_cli.lora.config import LoRAConfig
from lora_cli.models.base import read_config, resolve_base
from lora_cli.models.load import load_tokenizer
from lora_cli.wording import bytes_text

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = ROOT / "models/SmolLM2-135M-Instruct.gguf"
SHAPES = ("Llama-3.2-1B", "Llama-3.1-8B")
OURS, RIVAL = "lora", "PEFT"
SAME = {torch.float32: 2e-4, torch.bfloat16: 2e-2}  # how far losses may be apart, as a share
MARKS = re.compile(r"(<!-- bench -->\n).*?(<!-- /bench -->)", re.DOTALL)


@dataclass(frozen=True)
class Race:
    """One setting and who takes part; the first `warm` steps are not counted."""

    title: str
    setting: Setting
    contestants: Sequence[str]
    warm: int = 1


@dataclass
class Result:
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak: int = 0
    failed: str = ""

    @property
    def step(self) -> float:
        return statistics.median(self.seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and smaller steps")
    parser.add_argument("--gpu", action="store_true", help="1B and 8B shapes on a GPU")
    parser.add_argument("--only", default="", help="races whose title has this in it")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    parser.add_argument("--base", type=Path, default=SMOLLM2, help="on a CPU; default: %(default)s")
    parser.add_argument("--folder", type=Path, default=ROOT / "models", help="where random models are written")
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    races = gpu_races(asked.folder) if asked.gpu else cpu_races(asked.base, quick=asked.quick)
    device = torch.cuda.get_device_name() if asked.gpu else f"{processor()}, {asked.threads} thread"
    how = " ".join(["python scripts/bench.py", *(word for word in sys.argv[1:] if word != "--write")])
    where = f"`{how}` on {date.today():%d %B %Y}: {device}, torch {torch.__version__}, {_versions()}."
    parts, same = [f"{where}\n"], True
    for race in (race for race in races if asked.only in race.title):
        results = run(race, threads=asked.threads)
        same = losses_agree(race, results) and same
        parts.append(table(race, results, rate=rate(race.setting)))
        print(parts[-1], flush=True)
    if asked.write:
        readme = ROOT / "README.md"
        text = "\n".join(parts)
        readme.write_text(MARKS.sub(lambda found: f"{found[1]}{text}{found[2]}", readme.read_text()))
    return 0 if same else 1


def cpu_races(base: Path, *, quick: bool) -> list[Race]:
    """Steps of 512 to 1,024 tokens; of fewer in bfloat16, where a CPU that emulates it takes PEFT minutes for more."""
    folder = resolve_base(str(base)).folder
    tokenizer = load_tokenizer(folder)
    even = rows_of(even_lengths(20, 128 if quick else 256), tokenizer)
    few = rows_of(even_lengths(6, 64 if quick else 256), tokenizer)
    mixed = rows_of(mixed_lengths(24, 8, 256 if quick else 384), tokenizer)
    alike = Setting(folder, torch.float32, _steps(even, 4, 3 if quick else 5), 2, len(even[0].input_ids), 512)
    narrow = Setting(folder, torch.bfloat16, _steps(few, 2, 2 if quick else 3), 2, len(few[0].input_ids), 512)
    # All contestants are there at once: padded forwards of 8 such rows need more than 24 GB between them
    forward = 8 if quick else 4
    lengths = Setting(folder, torch.float32, _steps(mixed, 8, 2 if quick else 3), forward, packed=512, tokens=512)
    by_length = [] if quick else ["TRL", "lora, by length"]
    return [
        Race("rows of one length, float32", alike, _those("cpu", "PEFT", "TRL", OURS)),
        Race("rows of one length, bfloat16", narrow, _those("cpu", "PEFT", OURS)),
        Race("rows of mixed lengths, float32", lengths, _those("cpu", "PEFT", *by_length, "lora, padded", OURS)),
    ]


def gpu_races(folder: Path) -> list[Race]:
    """Small and large batches, with all activations kept and with every block computed again."""
    races = []
    for name in SHAPES:
        base, vocabulary = random_base(folder, name, "cuda")
        for count, length in ((1, 512), (4 if "8B" in name else 8, 2048)):
            for again in (False, True):
                rows = random_rows(even_lengths(count * 9, length), vocabulary)
                setting = Setting(
                    base, torch.bfloat16, _steps(rows, count, 9), count, length, count * length, "cuda", again
                )
                checkpointing = ", checkpointing" if again else ""
                races.append(Race(f"{name}, {count} × {length}{checkpointing}", setting, _those("cuda"), warm=3))
    return races


def random_base(folder: Path, name: str, device: str) -> tuple[Path, int]:
    """A model folder of a catalogue's shape, made once; and the size of its vocabulary."""
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    [config] = [entry.config for entry in CATALOGUE if entry.name == name]
    out = folder / f"random-{name}"
    if not (out / "tokenizer_config.json").is_file():
        torch.manual_seed(0)
        given = {key: value for key, value in config.items() if key != "model_type"}
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(config["model_type"], **given), dtype=torch.bfloat16
            )
        model.save_pretrained(out)
        words = Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>"))
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>").save_pretrained(out)
    return out, config["vocab_size"]


def run(race: Race, *, threads: int) -> dict[str, Result]:
    """Every contestant over the steps: in turn on a CPU, one behind the other on a GPU, which holds one at a time."""
    results = {name: Result() for name in race.contestants}
    if race.setting.device == "cpu":
        _take_turns(race, results, threads)
    else:
        for name in race.contestants:
            _take_turns(race, {name: results[name]}, threads)
    return results


def _take_turns(race: Race, results: dict[str, Result], threads: int) -> None:
    started = {name: _start(name, race.setting, threads) for name in results}
    pipes = {name: pipe for name, (pipe, _) in started.items()}
    for number in range(len(race.setting.steps)):
        for name, pipe in pipes.items():
            result = results[name]
            if result.failed:
                continue
            try:
                pipe.send("forget the peak" if number == race.warm else "go")
                found = pipe.recv()
            except (EOFError, BrokenPipeError):
                found = "failed"
            if isinstance(found, str):
                result.failed = found
                continue
            seconds, loss, result.peak = found
            result.losses.append(loss)
            if number >= race.warm:
                result.seconds.append(seconds)
    for pipe, process in started.values():
        pipe.close()
        process.join()  # its memory is the next one's


def _start(name: str, setting: Setting, threads: int) -> tuple[Connection, BaseProcess]:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(name, setting, theirs, threads), daemon=True)
    process.start()
    theirs.close()
    return ours, process


def losses_agree(race: Race, results: dict[str, Result]) -> bool:
    """Of all steps: the same rows, the same start, the same optimizer."""
    ours, agree = results[OURS].losses, True
    for name, result in results.items():
        apart = max((abs(a - b) / b for a, b in zip(result.losses, ours, strict=False)), default=0.0)
        if apart > SAME[race.setting.dtype] or result.failed == "failed":
            agree = False
            print(f"{race.title}: {name} {result.failed or f'has losses {apart:.1e} from ours'}", file=sys.stderr)
    return agree


def table(race: Race, results: dict[str, Result], *, rate: float) -> str:
    """Markdown: rows and tokens a second (none of padding), all and trained ones, against the rival, memory, share of the floor."""
    counted = race.setting.steps[race.warm :]
    done = [statistics.median(map(count, counted)) for count in (len, tokens_of, trained_tokens_of)]
    floor = statistics.median(operations_of(rows, race.setting) for rows in counted) / rate
    lines = [
        f"| {race.title} | rows/s | tokens/s | trained tokens/s | against {RIVAL} | memory | of the floor |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    rival = results.get(RIVAL)
    for name, result in results.items():
        if result.failed:
            lines.append(f"| {name} | {result.failed} | | | | | |")
            continue
        pairs = zip(rival.seconds, result.seconds, strict=False) if rival else ()
        against = statistics.median(ratios) if (ratios := [a / b for a, b in pairs]) else None
        rows, *tokens = (each / result.step for each in done)
        speeds = [f"{rows:,.2f}", *(f"{speed:,.0f}" for speed in tokens)]
        cells = [*speeds, f"{against:.2f} ×" if against else "–", bytes_text(result.peak)]
        lines.append(f"| {_bold(name)} | {' | '.join(cells)} | {floor / result.step:.0%} |")
    loss = results[OURS].losses
    end = f"loss {loss[0]:.4f} → {loss[-1]:.4f} in {len(loss)} steps, the same for all; " if len(loss) > 1 else ""
    return "\n".join(lines) + f"\n\n{end}{_described(counted, race.setting)}.\n"


def _described(steps: Sequence[Sequence[Example]], setting: Setting) -> str:
    lengths = [len(row.input_ids) for rows in steps for row in rows]
    full = sum(lengths) / sum(batch["input_ids"].numel() for rows in steps for batch in padded(rows, setting.size))
    rows = f"steps of {len(steps[0])} rows of {min(lengths)} to {max(lengths)} tokens, {setting.size} a padded forward"
    if min(lengths) == max(lengths):
        return f"steps of {len(steps[0])} rows of {lengths[0]} tokens, {setting.size} a forward"
    return f"{rows}, which are {full:.0%} full"


def tokens_of(rows: Sequence[Example]) -> int:
    return sum(len(row.input_ids) for row in rows)


def trained_tokens_of(rows: Sequence[Example]) -> int:
    return sum(weight > 0 for row in rows for weight in row.weights)


def operations_of(rows: Sequence[Example], setting: Setting) -> float:
    """Floating-point operations that a step owes, each row by itself and none for padding."""
    shape = shape_of(read_config(setting.folder))
    config = LoRAConfig(r=R, lora_alpha=R, target_modules=())
    how = How(number=setting.dtype.itemsize, attention="sdpa")
    setup = Setup(shape, tuple(adapted_linears(shape, PROJECTIONS)), config, how)
    batches = (Batch(1, len(row.input_ids), trained_tokens_of([row])) for row in rows)
    return sum(operations(setup, batch, 0.0) for batch in batches)


def rate(setting: Setting) -> float:
    """Operations a second of the fastest product at the model's widths, in the types that it may be computed in."""
    config = read_config(setting.folder)
    rows, narrow, wide = 4096 if setting.device == "cuda" else 512, config["hidden_size"], config["intermediate_size"]
    kinds = {setting.dtype, torch.float32} if setting.device == "cpu" else {setting.dtype}
    return max(
        2 * rows * narrow * wide / _seconds_of_product(rows, narrow, wide, kind, setting.device) for kind in kinds
    )


def _seconds_of_product(rows: int, narrow: int, wide: int, kind: torch.dtype, device: str) -> float:
    x, W = torch.randn(rows, narrow, dtype=kind, device=device), torch.randn(wide, narrow, dtype=kind, device=device)
    taken = []
    for _ in range(20 if device == "cuda" else 7):
        began = _clock(device)
        torch.nn.functional.linear(x, W)
        taken.append(_clock(device) - began)
    return min(taken[2:])


def _clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _steps(rows: Sequence[Example], size: int, count: int) -> list[list[Example]]:
    return [list(rows[i * size : (i + 1) * size]) for i in range(count)]


def _those(device: str, *names: str) -> list[str]:
    """The contestants that can run here, of all or of these."""
    skipped = () if names else ("lora, padded", "lora, by length", "full")
    wanted = [name for name in names or CONTESTANTS if name not in skipped]
    return [name for name in wanted if CONTESTANTS[name].can_run(device)]


def _versions() -> str:
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for package in ("transformers", "peft", "trl", "liger-kernel", "unsloth"):
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)


def processor() -> str:
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return platform.machine()


def _bold(name: str) -> str:
    return f"**{name}**" if name == OURS else name


if __name__ == "__main__":
    sys.exit(main())
