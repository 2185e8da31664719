"""Whether a step is slower than it was, on any architecture that the tests train: this code against an older one.

    python scripts/bench_before.py                  against the last commit before the lean step; some minutes on two cores
    python scripts/bench_before.py --before REF     against another
    python scripts/bench_before.py --only gemma     cases with this in their name
    python scripts/bench_before.py --write          its table into docs/speed.md

The older code is checked out into a temporary worktree. Each has a process, and they take turns, step by step, over the
same random model of a size where products count (hidden 256, 4 blocks) and the same rows; what counts is processor time
on one thread, the lower quartile of the steps, which other work disturbs least. Exits with 1 where losses differ, or a
step is slower by more than noise.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tests")]

import torch  # noqa: E402  behind what makes `tiny` importable
from bench import Result, processor  # noqa: E402
from tiny import CONFIGS, ENCODERS, EXPERTS, encoder_tokenizer  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, SqueezeBertConfig  # noqa: E402

from lora_cli.models.quiet import quiet_transformers  # noqa: E402
from lora_cli.wording import bytes_text  # noqa: E402

BEFORE = "fbb27b0"  # the last commit before the lean step
VOCABULARY, ROWS, LENGTH = 4096, 4, 128
WARM, STEPS = 2, 21
SAME, NOISE = 2e-4, 0.05  # of losses, as a share; of a ratio
MARKS = re.compile(r"(<!-- before -->\n).*?(<!-- /before -->)", re.DOTALL)
# Under the names that architectures have for them
SIZES = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(
        ("hidden_size", "n_embd", "dim", "word_embed_proj_dim", "embedding_size", "pooler_hidden_size"), 256
    ),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "ffn_dim", "ffn_hidden_size"), 704),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), 4),
    "moe_intermediate_size": 352,
    "head_dim": 64,
}


@dataclass(frozen=True)
class Case:
    """A base and what of it is adapted."""

    config: Callable[[], PretrainedConfig]
    targets: Any = "all-linear"
    classify: bool = False
    quantize: str = "none"
    lora: dict[str, Any] = field(default_factory=dict)


def squeezebert() -> SqueezeBertConfig:
    kinds = ("q", "k", "v", "post_attention", "intermediate", "output")
    return SqueezeBertConfig(num_attention_heads=4, pad_token_id=0, **{f"{kind}_groups": 1 for kind in kinds})


CASES = {
    **{name: Case(config) for name, config in {**CONFIGS, **EXPERTS}.items()},
    **{f"{name}, classifier": Case(config, classify=True) for name, config in ENCODERS.items()},
    "squeezebert, convolutions": Case(squeezebert, ["query", "key", "value", "conv1d"], classify=True),
    "mixtral, experts": Case(CONFIGS["mixtral"], ["experts.gate_up_proj", "experts.down_proj"]),
    "gpt_oss, experts": Case(EXPERTS["gpt_oss"], ["experts.gate_up_proj", "experts.down_proj"]),
    "llama, embeddings": Case(CONFIGS["llama"], ["embed_tokens", "q_proj", "v_proj"]),
    "llama, head": Case(CONFIGS["llama"], ["lm_head", "q_proj", "v_proj"]),
    "llama, DoRA": Case(CONFIGS["llama"], lora={"use_dora": True}),
    "llama, dropout": Case(CONFIGS["llama"], lora={"lora_dropout": 0.1}),
    "llama, nf4": Case(CONFIGS["llama"], quantize="nf4"),
    "llama, int8": Case(CONFIGS["llama"], quantize="int8"),
    "llama, classifier": Case(CONFIGS["llama"], classify=True),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", default=BEFORE, metavar="REF", help="the older code; default: %(default)s")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--write", action="store_true", help="put the table into docs/speed.md")
    asked = parser.parse_args()
    cases = {name: case for name, case in CASES.items() if asked.only in name}
    quiet_transformers()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        old = stack.enter_context(worktree(asked.before))
        before, now = (stack.enter_context(side(tree)) for tree in (old, ROOT))
        results = {}
        for name, case in cases.items():
            results[name] = race(case, folder, before, now, asked.steps)
            print(row(name, *results[name]), *(found.failed for found in results[name]), flush=True)
    wrong = [text for name, sides in results.items() for text in complaints(name, *sides)]
    if asked.write:
        page = ROOT / "docs/speed.md"
        text = "\n".join(
            [described(asked.before), "", *HEADING, *(row(name, *sides) for name, sides in results.items())]
        )
        page.write_text(MARKS.sub(lambda found: f"{found[1]}{text}\n{found[2]}", page.read_text()))
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


@contextmanager
def worktree(ref: str) -> Iterator[Path]:
    """The code of a commit in a folder of its own, for as long as it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "before"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), ref], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


@contextmanager
def side(tree: Path) -> Iterator[Callable[[Any], dict]]:
    """A process with the code of a tree, as a function: what is asked -> its answer."""
    script = Path(__file__).with_name("bench_before_side.py")
    process = subprocess.Popen(
        [sys.executable, "-P", str(script)],
        env=os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=tree,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def ask(what: Any) -> dict:
        print(json.dumps(what), file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    try:
        yield ask
    finally:
        process.stdin.close()
        process.wait()


def race(case: Case, folder: Path, before: Callable, now: Callable, steps: int) -> tuple[Result, Result]:
    """Both sides over the same steps, in turn."""
    asked = {
        "folder": str(base_of(case, folder)),
        "targets": case.targets,
        "vocabulary": VOCABULARY,
        "rows": ROWS,
        "length": LENGTH,
        "classify": case.classify,
        "quantize": case.quantize,
        **case.lora,
    }
    sides = [(before, Result()), (now, Result())]
    for ask, found in sides:
        found.failed = ask(asked).get("failed", "")
    for number in range(WARM + steps):
        for ask, found in sides:
            if not found.failed:
                _one_step(ask, found, counted=number >= WARM)
    for ask, found in sides:
        if not found.failed:
            found.peak = ask("memory")["bytes"]
    return sides[0][1], sides[1][1]


def _one_step(ask: Callable, found: Result, *, counted: bool) -> None:
    answer = ask("step")
    if "failed" in answer:
        found.failed = answer["failed"]
        return
    found.losses.append(answer["loss"])
    if counted:
        found.seconds.append(answer["seconds"])


def base_of(case: Case, folder: Path) -> Path:
    """A random model of the architecture, larger than that of the tests."""
    small = case.config()
    plain = {key: value for key, value in small.to_dict().items() if key != "layer_types"}  # a list, one a block
    config = type(small).from_dict(plain | {key: value for key, value in SIZES.items() if key in plain})
    for key in [key for key in config.to_dict() if "drop" in key]:
        setattr(config, key, 0.0)
    torch.manual_seed(0)
    encoder = case.classify and case.config not in CONFIGS.values()
    model = (AutoModel if encoder else AutoModelForCausalLM).from_config(config, dtype=torch.float32)
    out = Path(tempfile.mkdtemp(dir=folder))
    model.save_pretrained(out)
    encoder_tokenizer().save_pretrained(out)
    return out


def quick(found: Result) -> float:
    """Seconds of a step, of which a quarter was quicker."""
    return statistics.quantiles(found.seconds, n=4)[0]


def ratio(before: Result, now: Result) -> float:
    return quick(now) / quick(before)


HEADING = ["| | before | now | now / before | memory before | now |", "| --- | --- | --- | --- | --- | --- |"]


def row(name: str, before: Result, now: Result) -> str:
    if before.failed or now.failed:
        told = "did not train" if before.failed else "fails now"
        return f"| {name} | {told} | | | | |"
    times = [f"{1000 * quick(found):,.0f} ms" for found in (before, now)]
    memory = [bytes_text(found.peak) for found in (before, now)]
    return f"| {name} | {times[0]} | {times[1]} | {ratio(before, now):.2f} | {memory[0]} | {memory[1]} |"


def complaints(name: str, before: Result, now: Result) -> Iterator[str]:
    if now.failed:
        yield f"{name}: {now.failed}"
    if before.failed or now.failed:
        return
    apart = max(abs(a - b) / abs(a) for a, b in zip(before.losses, now.losses, strict=True))
    if apart > SAME:
        yield f"{name}: losses are {apart:.1e} apart"
    if (slower := ratio(before, now)) > 1 + NOISE:
        yield f"{name}: {slower:.2f} times as slow as before"


def described(ref: str) -> str:
    how = f"`{' '.join(['python scripts/bench_before.py', *(word for word in sys.argv[1:] if word != '--write')]).strip()}`"
    shape = f"hidden 256, 4 blocks, a vocabulary of {VOCABULARY:,}, steps of {ROWS} rows of {LENGTH} tokens, r = 16, float32"
    return f"{how} on {date.today():%d %B %Y}: {processor()}, 1 thread, torch {torch.__version__}; {shape}; before is {ref}."


if __name__ == "__main__":
    sys.exit(main())
