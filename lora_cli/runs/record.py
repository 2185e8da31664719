"""run.json: what a run was made from, what it ran on, and what came of it. Never a secret.

Opened before the first step, closed after the last one or by the error that ended it, and added to by a merge. What a
resumed run was before stays in it: its id, and one entry a session.
"""

import os
import platform
import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from hashlib import file_digest
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from lora_cli.data.encoder import tokenizer_fingerprint
from lora_cli.data.order import epoch_length, steps
from lora_cli.data.report import DataReport
from lora_cli.data.sources import is_path
from lora_cli.data.texts import token_texts
from lora_cli.data.types import UNKNOWN_FORM, Example, PromptForm
from lora_cli.durable import can_sync
from lora_cli.errors import UserError
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.shards import InShards
from lora_cli.models.recompute import setting_of
from lora_cli.recipe.reader import read_recipe, value_of
from lora_cli.recipe.schema import keys, share_of, sources_of
from lora_cli.recipe.secrets import redacted, redacted_command
from lora_cli.runs.decision import Decision
from lora_cli.runs.figures import histogram
from lora_cli.runs.folder import RunFolder, write_json
from lora_cli.runs.history import BROKEN_OFF, History, mean, number
from lora_cli.runs.lock import command
from lora_cli.runs.parts import Run
from lora_cli.runs.resume import Continuation, installed
from lora_cli.train.layout import filled

LIBRARIES = (
    "lora-cli",
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "safetensors",
    "datasets",
    "huggingface-hub",
    "bitsandbytes",
    "numpy",
    "jinja2",
)
# The environment that may change what a run does or how fast; nothing else of it is written down
ENVIRONMENT = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "HF_DATASETS_OFFLINE",
    "HF_HUB_OFFLINE",
    "MKL_NUM_THREADS",
    "NCCL_IB_DISABLE",
    "NCCL_P2P_DISABLE",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TOKENIZERS_PARALLELISM",
)
# Flags that loosen a promise: what they allow is said in the record, on the page and on the card
LOOSENING = ("--allow-base-mismatch", "--allow-change", "--together", "--trust-remote-code")
BARE = ("--allow-base-mismatch", "--together")  # of them, those that name nothing

OF_MERGE = ("out", "base", "tensors", "bytes", "dtypes", "lost", "unmoved_share", "base_differences", "untied", "proof")

LARGEST_DIGESTED = 256_000_000  # bytes of a data file whose digest is taken
MEASURED_STEPS = 5  # whose padding is measured
SHOWN_TOKENS = 160  # of the example row

Record = dict[str, Any]


def opened(run: Run, resumed: Continuation | None) -> Record:
    """The record before a session's first step; nothing is written here."""
    before = run.folder.read_record()
    step = resumed.checkpoint.progress.step if resumed else 0
    session = {"started": _now(), "from_step": step, "command": _command()}
    changes = [{"step": step, "changed": resumed.changed}] if resumed and resumed.changed else []
    found = {
        "id": before.get("id") or uuid4().hex,
        "sessions": [*before.get("sessions", []), session],
        "changes": [*before.get("changes", []), *changes],  # of what the run was started with: by key, (then, now)
        "base": {"name": run.base.name, "revision": run.base.revision, "fingerprint": asdict(run.fingerprint)},
        "tokenizer": {
            "fingerprint": tokenizer_fingerprint(run.tokenizer),
            "template": bool(run.tokenizer.chat_template),
        },
        "data": _data(run),
        "resolved": {
            "dtype": str(run.dtype).removeprefix("torch."),
            "device": str(run.accelerator.device),
            "processes": run.accelerator.num_processes,
            "sharded": isinstance(run.model, InShards),
            **asdict(run.settings.layout),  # micro_batch_size; row_length where rows are packed
            "gradient_checkpointing": setting_of(run.decision.recompute),
            "memory": _memory(run.decision),
            "filled": _filled(run),
            "scale": run.config.scale if run.config else None,
            "steps": run.plan.steps,
            "epoch_length": epoch_length(run.rows.train),
            "targets": list(run.config.target_modules) if run.config else [],
            "modules_to_save": list(run.config.modules_to_save) if run.config else [],
        },
        "parameters": {
            "trainable": run.budget.trainable,
            "base": run.budget.base,
            "total": run.budget.total,
            "adapter_bytes": run.budget.adapter_bytes,
            "modules": [asdict(row) | {"parameters": row.parameters} for row in run.budget.rows],
            "whole": [asdict(module) for module in run.budget.whole],
            "biases": run.budget.biases,
        },
        "settings": {key: _plain(value_of(run.recipe, key)) for key in keys()},
        "origins": dict(run.loaded.origins),
        "seed": run.recipe.training.seed,
        "loosened": sorted({*before.get("loosened", []), *loosened_by_command()}),
        "survives_power_loss": can_sync(run.folder.path),
        "machine": machine(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }
    return redacted(found)


def closed(record: Record, history: History, *, result: Mapping[str, object], proofs: list[str]) -> Record:
    """The record of a run that came to its end; `result` says what it left, an `adapter` or a `model`."""
    finished = history.finished or {}
    return (
        _ended(record)
        | {
            "result": _result(history) | {key: finished.get(key) for key in ("step", "reason", "adapter_step")},
            "proofs": proofs,
        }
        | result
    )


def described(adapter: Adapter) -> Record:
    """An adapter as the record has it."""
    updates = {path: float(f"{norm:.4g}") for path, norm in adapter.updates().items()}
    return {"sha256": adapter.digest(), "parameters": adapter.parameters, "updates": updates}


def broken_off(record: Record, history: History, why: Mapping[str, Any]) -> Record:
    """The record of a run that an error or a signal has ended."""
    return _ended(record) | {"result": _result(history) | why}


def why_broken_off(error: BaseException) -> Record:
    why = {"reason": BROKEN_OFF, "error": type(error).__name__, "exit_code": _exit_code(error)}
    if isinstance(error, UserError):
        why["error"] = redacted("\n".join(map(str, error.problems)))
    return why


def merged(record: Record, merge: Mapping[str, Any]) -> Record:
    """The record with what `lora merge` found; a merge to the same place takes the place of the one before."""
    said = {"at": _now(), "command": _command(), **{key: merge[key] for key in OF_MERGE}}
    others = [entry for entry in record.get("merges", []) if entry.get("out") != merge["out"]]
    loosened = sorted({*record.get("loosened", []), *loosened_by_command()})
    return record | {"merges": [*others, redacted(said)], "loosened": loosened}


def write_record(folder: RunFolder, record: Record) -> None:
    write_json(folder.record, record)


def _memory(decided: Decision) -> dict | None:
    """What a step is predicted to need, in bytes; None for a base without a formula."""
    return {**asdict(decided.planned.memory), "total": decided.planned.memory.total} if decided.planned else None


def trained_form(folder: Path) -> PromptForm:
    """How the rows were rendered that a run folder's adapter was trained on; of the first source, where there are several."""
    run = RunFolder(folder)
    try:
        formats = run.read_record()["data"]["train"]["formats"]
        format = next(iter(formats.values()), None)
    except (KeyError, TypeError, AttributeError):  # no run of ours
        return UNKNOWN_FORM
    template = read_recipe(run.recipe).recipe.data.template if format == "template" else None
    return PromptForm(format, template)


def machine() -> Record:
    """Versions, processor and devices."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "versions": {name: found for name in LIBRARIES if (found := installed(name))},
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "devices": [
            {"name": properties.name, "memory_bytes": properties.total_memory}
            for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ],
    }


def _data(run: Run) -> Record:
    rows = run.rows
    lengths = rows.all.lengths + rows.all.column("cut")
    return {
        "train": _report(rows.report),
        "held_out": _report(rows.held_out_report),
        "train_examples": len(rows.train),
        "held_out_examples": len(rows.held_out),
        "histogram": [asdict(bar) for bar in histogram(lengths, rows.report.lengths.p99)],
        "example": _example(run, rows.train[0]),
        "files": _files(run),
    }


def _report(report: DataReport | None) -> Record | None:
    return None if report is None else asdict(report)


def _example(run: Run, example: Example) -> Record:
    """One row as it is trained: its tokens as text, cut, with the weight of each."""
    shown = example.input_ids[:SHOWN_TOKENS]
    return {
        "row": str(example.row),
        "tokens": len(example.input_ids),
        "texts": token_texts(run.tokenizer, shown),
        "weights": example.weights[:SHOWN_TOKENS] if example.label is None else [0.0] * len(shown),
    }


def _files(run: Run) -> Record:
    """The data files on this machine by name, with their size and, if that is quick, their digest."""
    folder, data = run.loaded.path.parent, run.recipe.data
    held_out = [data.eval] if data.eval and share_of(data.eval) is None else []
    names = [source.source for source in sources_of(data.train) if is_path(source, folder)]
    names += [name for name in held_out if is_path(name, folder)]
    found = {}
    for name in names:
        with suppress(OSError):
            file = folder / Path(name).expanduser()
            size = file.stat().st_size
            found[name] = {"bytes": size, "sha256": _digest(file) if size <= LARGEST_DIGESTED else None}
    return found


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return file_digest(content, "sha256").hexdigest()


def _filled(run: Run) -> float:
    """The share of the computed tokens that is no padding, over the first steps on one device."""
    taken = [rows for _, rows in islice(steps(run.rows.train, run.plan, seed=run.recipe.training.seed), MEASURED_STEPS)]
    return round(mean([filled(rows, run.settings.layout) for rows in taken]), 4)


def _result(history: History) -> Record:
    """The figures of a run, as far as it came."""
    losses, held_out = history.curve("loss"), history.evaluated()
    speeds = sorted(speed for _, speed in history.curve("tokens_per_second"))
    last = history.steps[-1] if history.steps else {}
    finished = history.finished or {}
    return {
        "steps": history.last_step,
        "train_loss": mean([loss for _, loss in losses[-10:]]) if losses else None,  # over the last ten steps
        "held_out_loss": {"first": held_out[0][1], "last": held_out[-1][1], "best": min(loss for _, loss in held_out)}
        if held_out
        else None,
        "metrics": {name: history.evaluated(name)[-1][1] for name in history.metrics()},
        "trained_tokens": number(last.get("tokens")),
        "tokens_per_second": speeds[len(speeds) // 2] if speeds else None,  # of the median step
        "seconds": number(finished.get("seconds")) or number(last.get("seconds")),
        "peak_bytes": number(finished.get("peak_bytes")),
    }


def _ended(record: Record) -> Record:
    """The record, its last session ended now; of an end before this one nothing stays."""
    *earlier, session = record.get("sessions") or [{}]
    kept = {key: value for key, value in record.items() if key not in ("result", "proofs", "adapter", "model")}
    return kept | {"sessions": [*earlier, session | {"ended": _now()}]}


def _exit_code(error: BaseException) -> int:
    if isinstance(error, UserError):
        return error.code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _command() -> list[str]:
    """What the user typed, as words; workers have other arguments."""
    return redacted_command(shlex.split(command()))


def loosened_by_command() -> list[str]:
    """Every flag of this command line that loosens a promise, with what it names."""
    arguments = sys.argv[1:]
    found = []
    for place, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in LOOSENING:
            behind = value if equals else "".join(arguments[place + 1 : place + 2])
            found.append(flag if flag in BARE else f"{flag} {behind}")
    return found


def _plain(value: Any) -> Any:
    """A recipe's value as JSON has it."""
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
