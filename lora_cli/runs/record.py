"""run.json: what a run was made from and what it ran on. Versions and settings; never a secret."""

import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from lora_cli.data.pipeline import DataReport
from lora_cli.durable import can_sync
from lora_cli.runs.folder import RunFolder
from lora_cli.runs.parts import Run
from lora_cli.runs.resume import Continuation, installed

LIBRARIES = ("lora-cli", "torch", "transformers", "accelerate", "datasets", "bitsandbytes", "safetensors")


def record(run: Run, found: Continuation | None = None) -> dict[str, object]:
    """All that is worth knowing about a run before its first step, or before the one that it continues with."""
    changes = run.folder.read_record().get("changes", []) if found else []
    if found and found.changed:
        changes.append({"step": found.checkpoint.progress.step, "changed": found.changed})
    return {
        "base": {"name": run.base.name, "revision": run.base.revision, "fingerprint": asdict(run.fingerprint)},
        "data": {
            "train": _report(run.rows.report),
            "held_out": _report(run.rows.held_out_report),
            "held_out_examples": len(run.rows.held_out),
        },
        "resolved": {
            "dtype": str(run.dtype).removeprefix("torch."),
            "device": str(run.accelerator.device),
            "processes": run.accelerator.num_processes,
            **asdict(run.settings.layout),  # micro_batch_size; row_length where rows are packed
            "scale": run.config.scale,
            "steps": run.plan.steps,
            "targets": list(run.config.target_modules),
        },
        "parameters": {"trainable": run.budget.trainable, "base": run.budget.base},
        "seed": run.recipe.training.seed,
        "changes": changes,  # of what a resumed run was started with: by key, (then, now)
        "survives_power_loss": can_sync(run.folder.path),
        "machine": machine(),
    }


def _report(report: DataReport | None) -> dict | None:
    return None if report is None else asdict(report)


def trained_format(folder: Path) -> str | None:
    """The format of the rows that a run folder's adapter was trained on; None where the folder is no run."""
    try:
        formats = json.loads((RunFolder(folder).record).read_text())["data"]["train"]["formats"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return next(iter(formats.values()), None)


def machine() -> dict[str, object]:
    """Versions, processor and devices."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "versions": {name: found for name in LIBRARIES if (found := installed(name))},
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
