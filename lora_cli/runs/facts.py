"""A run in words and figures, for its page and its card: read off its record and its events.

Files of other versions, and those that were meddled with, give less; nothing here trusts their types.
"""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_cli.lora.base_files import Fingerprint
from lora_cli.runs.charts import curve_lines
from lora_cli.runs.history import BROKEN_OFF, INTERRUPTED, History, number
from lora_cli.runs.lock import resuming
from lora_cli.wording import bytes_text, compact, duration, inert

MOST_SAMPLES = 12  # prompts
MOST_STEPS = 6  # of a prompt's answers: the first, the last, and some between
TRAINING = (("lora", "train"), ("python", "-m", "lora_cli", "train"))
UNFINISHED = (INTERRUPTED, BROKEN_OFF)
LEVELS = 9  # of shade in the map of updates


def headline(record: Mapping[str, Any], history: History) -> str:
    """What was done and what came of it, in one sentence."""
    base = short_name(str(get(record, "base", "name") or "a base model"))
    rows = number(get(record, "data", "train_examples"))
    over = f" on {rows:,.0f} rows" if rows else ""
    steps, planned = history.last_step, history.planned_steps
    held_out = history.evaluated()
    if number(get(record, "result", "exit_code")) is not None:
        of = f" of {planned:,}" if planned else ""
        return f"Fine-tuning {base}{over} ended at step {steps:,}{of}, before its end."
    if not history.finished:
        of = f" of {planned:,}" if planned else ""
        if get(record, "result", "reason") == INTERRUPTED:
            return f"Fine-tuning {base}{over} was interrupted at step {steps:,}{of}."
        return f"Fine-tuning {base}{over}: {steps:,}{of} steps so far."
    done = f"{base} was fine-tuned{over} for {steps:,} steps"
    if len(held_out) > 1:
        before, after = held_out[0][1], held_out[-1][1]
        moved = "fell" if after < before else "rose" if after > before else "stayed"
        return f"{done}: its held-out loss {moved} from {before:.3f} to {after:.3f}."
    losses = curve_lines("", "", history.curve("loss"))[-1].points
    if losses:
        return f"{done}: its training loss went from {losses[0][1]:.2f} to {losses[-1][1]:.2f}."
    return f"{done}."


def facts(folder: Path, record: Mapping[str, Any], history: History) -> dict[str, Any]:
    """What the page is made of, besides charts and findings."""
    return {
        "title": f"{short_name(str(get(record, 'base', 'name') or 'LoRA'))} · lora",
        "headline": headline(record, history),
        "ended_by": get(record, "result", "error"),
        "tiles": tiles(record, history),
        "samples": samples(history),
        "data": _data(record),
        "histogram": _histogram(record),
        "example": _example(record),
        "modules": _modules(record),
        "updates": _updates(record),
        "proofs": [str(proof) for proof in listed(record, "proofs")],
        "merges": [merge_facts(merge) for merge in mappings(listed(record, "merges"))],
        "loosened": [str(flag) for flag in listed(record, "loosened")],
        "environment": _environment(record),
        "settings": _settings(record),
        "next": next_commands(folder, record),
        "folder": str(folder),
        "damaged": history.damaged,
    }


def tiles(record: Mapping[str, Any], history: History) -> list[tuple[str, str, str]]:
    """(what, figure, note) of the figures that a person looks for first."""
    tiles = []
    if held_out := history.evaluated():
        first = f"from {held_out[0][1]:.3f}" if len(held_out) > 1 else ""
        tiles.append(("held-out loss", f"{held_out[-1][1]:.3f}", first))
    for name in (["perplexity"] if history.evaluated("perplexity") else []) + list(history.metrics()):
        measured = history.evaluated(name)
        tiles.append((name, compact(measured[-1][1]), f"from {compact(measured[0][1])}" if len(measured) > 1 else ""))
    if not held_out and (losses := history.curve("loss")):
        smooth = curve_lines("", "", losses)[-1].points
        tiles.append(("training loss", f"{smooth[-1][1]:.3f}", f"from {smooth[0][1]:.3f}"))
    trainable, total = parameters(record)
    if trainable and total:
        tiles.append(("parameters", compact(trainable), f"{trainable / total:.2%} are trained"))
    seconds = number(get(record, "result", "seconds")) or (history.curve("seconds") or [(0, 0.0)])[-1][1]
    if seconds:
        tiles.append(("time", duration(seconds), f"{history.last_step:,} steps"))
    if speed := number(get(record, "result", "tokens_per_second")):
        tiles.append(("tokens a second", compact(speed), "the median step"))
    if peak := number(get(record, "result", "peak_bytes")):
        tiles.append(("peak memory", bytes_text(peak), _of_memory(record)))
    return tiles


def parameters(record: Mapping[str, Any]) -> tuple[float, float]:
    """Those that are trained, and all; a total of 0 where it is not known."""
    trainable, base, total = (number(get(record, "parameters", key)) or 0 for key in ("trainable", "base", "total"))
    return trainable, total or (base and base + trainable)


def next_commands(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """What to type now: to try the adapter, or to go on where the run did not come to its end."""
    if unfinished(record):
        words = last_command(record)
        ours = any(words[: len(start)] == list(start) for start in TRAINING)  # a record may come from a stranger
        return [inert(resuming(words)).replace("\n", " ")] if ours else []
    if is_full(record):
        base = shlex.quote(inert(str(get(record, "base", "name") or "BASE")))
        return [
            f"lora generate --base {folder} --prompt '…'",
            f"lora eval {folder}/recipe.yaml",
            f"lora extract --base {base} --tuned {folder} --r 16 --out adapter/",
        ]
    tries = f"lora generate --adapter {folder} --prompt '…'"
    rest = [f"lora eval {folder}/recipe.yaml --adapter {folder}", f"lora merge --adapter {folder}"]
    return rest if objective(record) == "classify" else [tries, *rest]


def unfinished(record: Mapping[str, Any]) -> bool:
    return get(record, "result", "reason") in UNFINISHED


def is_full(record: Mapping[str, Any]) -> bool:
    """Whether every weight was trained: what was left is a model and no adapter."""
    return get(record, "settings", "training.method") == "full"


def last_command(record: Mapping[str, Any]) -> list[str]:
    sessions = mappings(listed(record, "sessions"))
    return [str(word) for word in listed(sessions[-1], "command")] if sessions else []


def objective(record: Mapping[str, Any]) -> str:
    found = get(record, "settings", "training.objective")
    return str(found.get("kind") if isinstance(found, Mapping) else found)


def _of_memory(record: Mapping[str, Any]) -> str:
    devices = mappings(listed(record, "machine", "devices"))
    memory = number(devices[0].get("memory_bytes") if devices else get(record, "machine", "memory_bytes"))
    return f"of {bytes_text(memory)}" if memory else ""


def samples(history: History) -> list[dict[str, Any]]:
    """The answers to each prompt by step: the first, the last, and up to MOST_STEPS in all."""
    answers: dict[str, list[tuple[int, str]]] = {}
    for event in history.samples:
        samples = event.get("samples")
        for prompt, text in samples.items() if isinstance(samples, Mapping) else ():
            answers.setdefault(prompt, []).append((event["step"], str(text)))
    return [
        {"prompt": prompt, "first": found[0], "last": found[-1], "between": _spread(found[1:-1], MOST_STEPS - 2)}
        for prompt, found in list(answers.items())[:MOST_SAMPLES]
    ]


def _spread(values: list, most: int) -> list:
    """Up to `most` of the values, at even distances."""
    return values if len(values) <= most else [values[(2 * i + 1) * len(values) // (2 * most)] for i in range(most)]


def _data(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    train = get(record, "data", "train")
    if not isinstance(train, Mapping):
        return []
    count = {key: number(train.get(key)) or 0 for key in ("rows", "tokens", "trained_tokens", "cut_rows", "cut_tokens")}
    formats = train.get("formats") if isinstance(train.get("formats"), Mapping) else {}
    dropped = train.get("dropped") if isinstance(train.get("dropped"), Mapping) else {}
    longest = number(get(train, "lengths", "longest"))
    facts = [
        ("rows read", f"{count['rows']:,.0f}"),
        *((f"format of {name}", str(format)) for name, format in formats.items()),
        ("trained on", f"{number(get(record, 'data', 'train_examples')) or 0:,.0f} examples"),
        ("held out", f"{number(get(record, 'data', 'held_out_examples')) or 0:,.0f} examples"),
        ("tokens", f"{count['tokens']:,.0f}"),
        _learned(train, count),
    ]
    facts += [("longest row", f"{longest:,.0f} tokens")] if longest else []
    facts.append(("cut by max_length", f"{count['cut_rows']:,.0f} rows, {count['cut_tokens']:,.0f} tokens"))
    facts += [(f"left out: {reason}", f"{number(rows) or 0:,.0f} rows") for reason, rows in dropped.items()]
    filled = number(get(record, "resolved", "filled"))
    return facts + ([("padding computed", f"{1 - filled:.0%}")] if filled is not None else [])


def _learned(train: Mapping[str, Any], count: Mapping[str, float]) -> tuple[str, str]:
    """The labels of rows that are classified, else the tokens that are trained."""
    labels = train.get("labels")
    if isinstance(labels, Mapping) and labels:
        return "labels", ", ".join(f"{label} {number(rows) or 0:,.0f}" for label, rows in labels.items())
    return (
        "of them trained",
        f"{count['trained_tokens']:,.0f} ({count['trained_tokens'] / max(1, count['tokens']):.0%})",
    )


def _histogram(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    bars = []
    for bar in mappings(listed(record, "data", "histogram")):
        least, most, examples = (number(bar.get(key)) for key in ("least", "most", "examples"))
        if least is not None and examples is not None:
            bars.append({"label": f"{least:.0f}–{most:.0f}" if most else f"{least:.0f} +", "examples": examples})
    largest = max((bar["examples"] for bar in bars), default=0) or 1
    return [
        bar | {"count": f"{bar['examples']:,.0f}", "width": f"{100 * bar['examples'] / largest:.1f}%"} for bar in bars
    ]


def _example(record: Mapping[str, Any]) -> dict[str, Any] | None:
    texts, weights = (listed(record, "data", "example", key) for key in ("texts", "weights"))
    if not texts or len(texts) != len(weights):
        return None
    spans: list[tuple[bool, str]] = []
    for text, weight in zip(texts, weights, strict=True):
        trained = bool(number(weight))
        before = spans.pop()[1] if spans and spans[-1][0] == trained else ""
        spans.append((trained, before + str(text)))
    tokens = number(get(record, "data", "example", "tokens")) or len(texts)
    return {"row": str(get(record, "data", "example", "row")), "spans": spans, "more": max(0, int(tokens) - len(texts))}


def _modules(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    trainable = number(get(record, "parameters", "trainable")) or 1
    rows = []
    for row in mappings(listed(record, "parameters", "modules")):
        figures = [number(row.get(key)) or 0 for key in ("in_features", "out_features", "r", "count", "parameters")]
        shape = f"{figures[0]:,.0f} → {figures[1]:,.0f}"
        counts = [f"{figure:,.0f}" for figure in figures[2:]]
        rows.append((str(row.get("module")), shape, *counts, f"{figures[-1] / trainable:.1%}"))
    for module in mappings(listed(record, "parameters", "whole")):
        count, shape = number(module.get("parameters")) or 0, "new, whole" if module.get("new") else "whole"
        rows.append((str(module.get("module")), shape, "", "1", f"{count:,.0f}", f"{count / trainable:.1%}"))
    if biases := number(get(record, "parameters", "biases")):
        rows.append(("biases", "", "", "", f"{biases:,.0f}", f"{biases / trainable:.1%}"))
    return rows


def _updates(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """How far each module moved, as a map: kinds of modules down, blocks across."""
    norms = get(record, "adapter", "updates")
    cells: dict[str, dict[int, tuple[str, float]]] = {}
    for path, norm in norms.items() if isinstance(norms, Mapping) else ():
        block = re.search(r"\.([0-9]{1,4})\.", str(path))
        if block and number(norm) is not None:
            cells.setdefault(str(path)[block.end() :], {})[int(block[1])] = (str(path), float(norm))
    blocks = sorted({block for row in cells.values() for block in row})
    if len(blocks) < 2:
        return None
    largest = max(norm for row in cells.values() for _, norm in row.values()) or 1.0
    return {
        "kinds": list(cells),
        "blocks": (blocks[0], blocks[-1]),
        "across": len(blocks),
        "cells": [
            {
                "x": blocks.index(block),
                "y": y,
                "path": path,
                "norm": compact(norm),
                "shade": round(LEVELS * norm / largest),
            }
            for y, row in enumerate(cells.values())
            for block, (path, norm) in row.items()
        ],
        "largest": compact(largest),
    }


def merge_facts(merge: Mapping[str, Any]) -> dict[str, Any]:
    proof = merge.get("proof")
    lost, kl, same = (
        number(merge.get("lost")),
        number(get(merge, "proof", "kl")),
        number(get(merge, "proof", "same_top1")),
    )
    parts = []
    if isinstance(proof, Mapping):
        difference = number(proof.get("largest_logit_difference"))
        parts += [f"logits differ by at most {difference:.2g}"] if difference is not None else []
        parts += [f"KL {kl:.2g} nats a token"] if kl is not None else []
        parts += [f"the same first choice at {same:.1%} of the tokens"] if same is not None else []
    parts += [f"storing rounded off {lost:.2%} of the update"] if lost is not None else []
    return {"out": str(merge.get("out")), "at": str(merge.get("at", "")), "text": "; ".join(parts)}


def _environment(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    machine = record.get("machine") if isinstance(record.get("machine"), Mapping) else {}
    devices = [str(device.get("name")) for device in mappings(listed(machine, "devices"))]
    versions = machine.get("versions") if isinstance(machine.get("versions"), Mapping) else {}
    memory = number(machine.get("memory_bytes"))
    sessions = mappings(listed(record, "sessions"))
    resolved = record.get("resolved") if isinstance(record.get("resolved"), Mapping) else {}
    known = Fingerprint.from_record(get(record, "base", "fingerprint"))
    facts = [
        ("run", record.get("id")),
        *(
            (
                f"session {place}" if len(sessions) > 1 else "run at",
                f"{each.get('started')} to {each.get('ended', '…')}",
            )
            for place, each in enumerate(sessions, 1)
        ),
        ("command", " ".join(last_command(record)) or None),
        ("seed", record.get("seed")),
        ("devices", ", ".join(devices) or f"{resolved.get('device', 'cpu')}, {machine.get('threads')} threads"),
        ("processes", resolved.get("processes")),
        ("dtype", resolved.get("dtype")),
        ("platform", machine.get("platform")),
        ("memory", bytes_text(memory) if memory else None),
        ("python", machine.get("python")),
        ("cuda", machine.get("cuda")),
        (
            "base",
            " @ ".join(str(part) for part in (get(record, "base", "name"), get(record, "base", "revision")) if part),
        ),
        ("base fingerprint", known.short if known else None),
        ("tokenizer fingerprint", get(record, "tokenizer", "fingerprint")),
        ("data fingerprint", get(record, "data", "train", "fingerprint")),
        ("adapter SHA-256", get(record, "adapter", "sha256")),
        ("model SHA-256", get(record, "model", "sha256")),
        *versions.items(),
        *(record.get("environment") if isinstance(record.get("environment"), Mapping) else {}).items(),
    ]
    return [(str(name), str(value)) for name, value in facts if value not in (None, "")]


def _settings(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(key, value, origin) of the recipe, `default` for what it does not set."""
    settings = record.get("settings") if isinstance(record.get("settings"), Mapping) else {}
    origins = record.get("origins") if isinstance(record.get("origins"), Mapping) else {}
    return [
        (
            str(key),
            json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value,
            str(origins.get(key, "")),
        )
        for key, value in settings.items()
    ]


def short_name(name: str) -> str:
    """The last part of a path or hub id."""
    return inert(name.rstrip("/").rpartition("/")[2].removesuffix(".gguf")) or "a base model"


def get(record: Mapping[str, Any], *path: str) -> Any:
    """A value of the record; None where it has none."""
    found: Any = record
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def listed(record: Mapping[str, Any], *path: str) -> list[Any]:
    found = get(record, *path)
    return found if isinstance(found, list) else []


def mappings(values: list[Any]) -> list[Mapping[str, Any]]:
    return [value for value in values if isinstance(value, Mapping)]
