"""Where the shape of a base is found: its folder, the built-in catalogue, the hub's cache on this machine, the hub."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_cli.budget import catalogue
from lora_cli.budget.params import Whole
from lora_cli.budget.quantised import quantised_by, unknown_method
from lora_cli.budget.shapes import Config, ModelShape, shape_of
from lora_cli.errors import ModelError, Problem
from lora_cli.lora.config import matches
from lora_cli.lora.targets import ALL_LINEAR, is_letters
from lora_cli.models.base import hub_folder, read_config
from lora_cli.models.gguf import converted_folder

CATALOGUE = "catalogue"


@dataclass(frozen=True)
class MeasuredBase:
    """A base in numbers, and where they come from: the catalogue, or the folder of its config.json.

    `whole` are the modules trained whole, where any are asked for.
    """

    name: str
    source: str
    shape: ModelShape
    whole: tuple[Whole, ...] = ()
    biases: int | None = None  # of the whole model, where they are asked for


def measure_base(
    name: str,
    revision: str | None = None,
    *,
    labels: Sequence[str] = (),
    modules_to_save: Sequence[str] = (),
    targets: str | Sequence[str] = ALL_LINEAR,
    bias: str = "none",
    tokens: Sequence[str] = (),
) -> MeasuredBase:
    """The base that `name` means: a folder, a GGUF file, a name of the catalogue, or a hub id.

    Under a head with an output for each of the `labels`, and with `modules_to_save` trained whole, where they are given;
    with `bias: all`, its biases are counted, and with `tokens` their rows.
    Where `targets` name more than linear layers, the modules are built, without weights.
    A GGUF file is converted once (some seconds, with torch). Raises ModelError where there is no such base, where the hub
    is needed and doesn't answer, or for an unknown architecture.
    """
    entry = catalogue.find(name)
    folder = Path(name).expanduser()
    if entry and not (folder / "config.json").is_file():
        return _measured(entry.name, CATALOGUE, entry.config, labels, modules_to_save, targets, bias, tokens)
    if folder.suffix == ".gguf" and folder.is_file():
        folder = converted_folder(folder)
    elif not folder.is_dir():
        folder = _in_hub_cache(name, revision or "main") or _from_hub(name, revision)
    return _measured(name, str(folder), read_config(folder), labels, modules_to_save, targets, bias, tokens)


def _measured(
    name: str,
    source: str,
    config: Config,
    labels: Sequence[str],
    modules_to_save: Sequence[str],
    targets: str | Sequence[str],
    bias: str,
    tokens: Sequence[str],
) -> MeasuredBase:
    where = str(Path(source) / "config.json") if source != CATALOGUE else ""
    if not labels and not modules_to_save and not tokens and bias != "all":
        shape = shape_of(config, where=where)
        if _are_linear(targets, shape):
            return MeasuredBase(name, source, _noted(shape))
    from lora_cli.budget.modules import biases_of, build, of_tokens, shape_of_modules, whole_of, whole_paths
    from lora_cli.models.heads import Head

    model = build(config, Head(tuple(labels)) if labels else None, where=where)
    paths = whole_paths(model, modules_to_save)
    biases = biases_of(model, bias, whole=paths) if bias == "all" else None
    whole = [*whole_of(model, paths), *of_tokens(model, tokens)]
    return MeasuredBase(name, source, _noted(shape_of_modules(model)), tuple(whole), biases)


def _noted(shape: ModelShape) -> ModelShape:
    """With a word on a base that is quantised on disk."""
    if method := unknown_method(shape.config):
        note = f"the base is quantised on disk ({method}), in a way without a formula: it is counted in 16 bits"
    elif on_disk := quantised_by(shape.config):
        note = f"the base is quantised on disk: {on_disk.name}"
    else:
        return shape
    return replace(shape, notes=(*shape.notes, note))


def _are_linear(targets: str | Sequence[str], shape: ModelShape) -> bool:
    """Whether the targets are linear layers alone, as far as a formula can tell."""
    if targets == ALL_LINEAR or is_letters(targets):
        return True
    names = [targets] if isinstance(targets, str) else targets
    has_experts = any("expert" in key and value for key, value in shape.config.items())
    try:
        return not has_experts and all(any(matches(name, x.path) for x in shape.linears) for name in names)
    except re.error:
        return True  # said where the targets are chosen


def local_folder(name: str, revision: str | None = None) -> Path | None:
    """The folder of a base that is on this machine already: its own, or that of the hub's cache."""
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else _in_hub_cache(name, revision or "main")


def _in_hub_cache(name: str, revision: str) -> Path | None:
    """The cached snapshot of a branch, tag or commit, if its config.json is there."""
    repository = _hub_cache() / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = repository / "snapshots" / commit
    return snapshot if (snapshot / "config.json").is_file() else None


def _hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()


def _from_hub(name: str, revision: str | None) -> Path:
    """The folder of a config.json that is downloaded now, without the weights."""
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(_unknown(name))
    return hub_folder(name, revision, ["config.json"])


def _unknown(name: str) -> Problem:
    near = catalogue.nearest(name)
    fix = f"the nearest: {', '.join(near)}; " if near else ""
    return Problem(
        f"`{name}` is neither a model's folder nor in the catalogue",
        fix=f"{fix}`lora params --list` shows the catalogue, and a model's folder works too",
    )
