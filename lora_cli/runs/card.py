"""README.md of a run folder: the model card, as the hub and PEFT read it, with the run's own numbers.

What others wrote (names, prompts, answers) stands in code, where Markdown and HTML mean nothing.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lora_cli import __version__
from lora_cli.data.sources import is_path
from lora_cli.recipe.schema import share_of
from lora_cli.runs.facts import (
    get,
    headline,
    is_full,
    listed,
    mappings,
    merge_facts,
    next_commands,
    objective,
    parameters,
    samples,
    unfinished,
)
from lora_cli.runs.folder import RunFolder, write_text
from lora_cli.runs.history import History, number
from lora_cli.wording import bytes_text, duration, inert

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Objective -> the hub's name of the task, and the class of transformers that holds the base
TASKS = {"classify": ("text-classification", "AutoModelForSequenceClassification")}
OTHER_TASKS = ("text-generation", "AutoModelForCausalLM")
USE_MODEL = """from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")"""
SHOWN_SAMPLES = 3
LONGEST_SAMPLE = 600  # characters


def write_card(folder: RunFolder, record: Mapping[str, Any], history: History) -> None:
    write_text(folder.card, card(record, history))


def card(record: Mapping[str, Any], history: History) -> str:
    front = yaml.safe_dump(_front(record), sort_keys=False, allow_unicode=False, width=120)
    parts = [_trained(record, history), _results(record, history), _samples(history), _use(record), _proofs(record)]
    title = "A fine-tuned model" if is_full(record) else "A LoRA adapter"
    return f"---\n{front}---\n\n# {title}\n\n{prose(headline(record, history))}\n\n" + "\n".join(filter(None, parts))


def code(text: str, most: int = 300) -> str:
    """Foreign text in a line of prose: a code span that it can't end."""
    line = " ".join(inert(text).split())[:most] or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if line[0] == "`" or line[-1] == "`" else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def block(text: str) -> str:
    """Foreign text of several lines: a code block that it can't end."""
    shown = inert(text)[:LONGEST_SAMPLE] + ("…" if len(text) > LONGEST_SAMPLE else "")
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence}text\n{shown}\n{fence}"


def prose(text: str) -> str:
    """Foreign text in prose, with all that Markdown and HTML would read escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|~!&$])", r"\\\1", " ".join(inert(text).split()))


def _front(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the hub reads. A base that is no hub id is left out: the hub would refuse the card."""
    base = str(get(record, "base", "name") or "")
    on_hub = bool(get(record, "base", "revision")) and HUB_ID.fullmatch(base)
    datasets = _datasets(record)
    relation, library = ("finetune", "transformers") if is_full(record) else ("adapter", "peft")
    return {
        **({"base_model": base, "base_model_relation": relation} if on_hub else {}),
        "library_name": library,
        "pipeline_tag": _task(record)[0],
        **({"datasets": datasets} if datasets else {}),
        "tags": [*(["lora"] * (relation == "adapter")), *([f"base_model:{relation}:{base}"] if on_hub else [])],
    }


def _task(record: Mapping[str, Any]) -> tuple[str, str]:
    return TASKS.get(objective(record), OTHER_TASKS)


def _datasets(record: Mapping[str, Any]) -> list[str]:
    """The sources that are hub ids."""
    train = get(record, "settings", "data.train")
    entries = [train] if isinstance(train, str) else train if isinstance(train, list) else []
    names = [entry.get("source") if isinstance(entry, Mapping) else entry for entry in entries]
    held_out = get(record, "settings", "data.eval")
    names += [held_out] if isinstance(held_out, str) and share_of(held_out) is None else []
    local = get(record, "data", "files") or {}
    found = [name for name in names if isinstance(name, str) and name not in local and HUB_ID.fullmatch(name)]
    return list(dict.fromkeys(name for name in found if not is_path(name, Path("/nonexistent"))))


def _trained(record: Mapping[str, Any], history: History) -> str:
    def setting(key: str) -> str:
        value = get(record, "settings", key)
        return prose(", ".join(map(str, value)) if isinstance(value, list) else str(value))

    base, commit = (get(record, "base", key) for key in ("name", "revision"))
    formats = get(record, "data", "train", "formats")
    trainable, total = parameters(record)
    scale, rows = number(get(record, "resolved", "scale")), number(get(record, "data", "train_examples"))
    rows = [
        ("base", code(str(base)) + (f" at {code(str(commit))}" if commit else "")),
        ("data", ", ".join(map(code, formats)) if isinstance(formats, Mapping) else ""),
        ("rows", f"{rows:,.0f}" if rows else ""),
        (
            "LoRA",
            "" if is_full(record) else f"r = {setting('lora.r')}, scale {scale or 0:g}, on {setting('lora.targets')}",
        ),
        ("trained parameters", f"{trainable:,.0f} of {total:,.0f}" if total else ""),
        ("steps", f"{history.last_step:,} of {setting('training.global_batch_size')} rows"),
        ("learning rate", f"{setting('training.learning_rate')}{_of_B(record)}, {setting('training.lr_scheduler')}"),
        ("seed", prose(str(record.get("seed")))),
    ]
    lines = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows if value]
    return "## What was trained\n\n| | |\n| --- | --- |\n" + "\n".join(lines) + "\n"


def _of_B(record: Mapping[str, Any]) -> str:
    """The rate of B where it has one of its own (LoRA+)."""
    keys = ("training.learning_rate", "training.loraplus_lr_ratio")
    lr, ratio = (number(get(record, "settings", key)) for key in keys)
    return f" (B: {lr * ratio:g})" if lr and ratio and ratio != 1 else ""


def _results(record: Mapping[str, Any], history: History) -> str:
    rows = []
    for name, key in [("held-out loss", "loss"), ("perplexity", "perplexity"), *((m, m) for m in history.metrics())]:
        if measured := history.evaluated(key):
            (first, before), (last, after) = measured[0], measured[-1]
            known = [f"{before:.4g}" if first < last or not first else "–", f"{after:.4g}" if last else "–"]
            rows.append(f"| {prose(name)} | {known[0]} | {known[1]} |")
    loss = number(get(record, "result", "train_loss"))
    if loss is not None:
        rows.append(f"| training loss | – | {loss:.4g} |")
    if not rows:
        return ""
    seconds, peak = (number(get(record, "result", key)) for key in ("seconds", "peak_bytes"))
    cost = [
        f"{duration(seconds)} of training" if seconds else "",
        f"{bytes_text(peak)} of memory at most" if peak else "",
    ]
    table = "| | before | after |\n| --- | --- | --- |\n" + "\n".join(rows)
    return f"## Results\n\n{table}\n\n" + (f"{', '.join(filter(None, cost))}.\n" if any(cost) else "")


def _samples(history: History) -> str:
    found = [sample for sample in samples(history) if sample["first"][0] != sample["last"][0]][:SHOWN_SAMPLES]
    if not found:
        return ""
    parts = [
        f"Prompt\n\n{block(sample['prompt'])}\n\nBefore\n\n{block(sample['first'][1])}\n\nAfter\n\n{block(sample['last'][1])}\n"
        for sample in found
    ]
    return "## Samples\n\n" + "\n".join(parts)


def _use(record: Mapping[str, Any]) -> str:
    """Commands and code name the base in quotes of their own language, so that no name can end them."""
    if unfinished(record):
        lines = "\n".join(next_commands(Path(), record))
        return f"## Not finished\n\nThere is no result yet, but for what is in `checkpoints/`. To go on:\n\n{_fenced('sh', lines)}\n"
    if is_full(record):
        return f"## Use\n\nIn this folder:\n\n{_fenced('sh', next_commands(Path('.'), record)[0])}\n\n{_fenced('python', USE_MODEL)}\n"
    base = str(get(record, "base", "name") or "BASE")
    r = number(get(record, "settings", "lora.r")) or 8
    labels = len(get(record, "data", "train", "labels") or ())
    merge = "lora merge --adapter . --out merged/           # one model, with proof"
    commands = (
        "lora generate --adapter . --prompt 'Hello'     # base and adapter side by side\n"
        f"{merge}\n\n"
        f"vllm serve {_shell(base)} --enable-lora --max-lora-rank {max(16, int(r))} --lora-modules adapter=."
    )
    if labels:
        commands = f"lora eval --adapter . --data rows.jsonl        # accuracy and macro-F1\n{merge}"
    model, head = _task(record)[1], f", num_labels={labels}" if labels else ""
    longer = (  # never shorter: many tables have rows to spare
        "if len(tokenizer) > base.get_input_embeddings().num_embeddings:  # rows for the new tokens\n"
        "    base.resize_token_embeddings(len(tokenizer))\n"
    )
    python = (
        f"from peft import PeftModel\nfrom transformers import {model}, AutoTokenizer\n\n"
        f'base = {model}.from_pretrained({_quoted(base)}{head})\ntokenizer = AutoTokenizer.from_pretrained(".")\n'
        f"{longer if listed(record, 'settings', 'lora.new_tokens') else ''}"
        'model = PeftModel.from_pretrained(base, ".")'
    )
    return f"## Use\n\nIn this folder:\n\n{_fenced('sh', commands)}\n\n{_fenced('python', python)}\n"


def _proofs(record: Mapping[str, Any]) -> str:
    merges = [merge_facts(merge) for merge in mappings(listed(record, "merges"))]
    lines = [f"- {prose(str(proof))}" for proof in listed(record, "proofs")]
    lines += [f"- merged into {code(merge['out'])}: {prose(merge['text'])}" for merge in merges]
    lines += [f"- a promise was loosened by {code(str(flag))}" for flag in listed(record, "loosened")]
    made = f"Made by `lora` {__version__}. `report.html` has curves, data and a diagnosis, `run.json` all figures.\n"
    return ("## Proofs\n\n" + "\n".join(lines) + "\n\n" if lines else "") + made


def _quoted(text: str) -> str:
    """A Python string of it that no line end or other control character can leave."""
    return ascii(inert(text).replace("\n", " "))


def _shell(text: str) -> str:
    import shlex

    return shlex.quote(" ".join(inert(text).split()))


def _fenced(language: str, text: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
