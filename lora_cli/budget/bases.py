"""Where the shape of a base is found: its folder, the built-in catalogue, the hub's cache on this machine, the hub."""

import os
from dataclasses import dataclass
from pathlib import Path

from lora_cli.budget import catalogue
from lora_cli.budget.shapes import ModelShape, shape_of
from lora_cli.errors import ModelError, Problem
from lora_cli.models.base import HUB_PAGE, read_config

CATALOGUE = "catalogue"


@dataclass(frozen=True)
class MeasuredBase:
    """A base in numbers, and where they come from: the catalogue, or the folder of its config.json."""

    name: str
    source: str
    shape: ModelShape


def measure_base(name: str, revision: str | None = None) -> MeasuredBase:
    """The base that `name` means: a folder, a name of the catalogue, or a hub id.

    Raises ModelError where there is none, where the hub is needed and doesn't answer, or for an unknown architecture.
    """
    entry = catalogue.find(name)
    folder = Path(name).expanduser()
    if entry and not (folder / "config.json").is_file():
        return MeasuredBase(entry.name, CATALOGUE, shape_of(entry.config))
    if folder.is_file():
        fix = "give the model's folder, or the name of its base"
        raise ModelError(Problem("parameters are counted from a folder's config.json, not from a file", name, fix=fix))
    if not folder.is_dir():
        folder = _in_hub_cache(name, revision or "main") or _from_hub(name, revision)
    return MeasuredBase(name, str(folder), shape_of(read_config(folder), where=str(folder / "config.json")))


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
        raise ModelError(_unknown(name, f"`{name}` is neither a model's folder nor in the catalogue"))
    # 0.2 s to import, and needed only for a base that nothing here knows
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision)).parent
    except GatedRepoError as error:
        page = HUB_PAGE.format(name=name)
        fix = f"accept its licence at {page}, then run `hf auth login` or set HF_TOKEN"
        raise ModelError(Problem(f"{name} is gated, and no token with access to it was given", fix=fix)) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(_unknown(name, f"the hub has no model {name}, or it is private")) from error
    except (EntryNotFoundError, OSError) as error:  # OSError: no network, and every other error of the hub
        what = f"{name} is neither in the catalogue nor in the hub's cache, and the hub gives no config.json for it"
        raise ModelError(_unknown(name, what)) from error


def _unknown(name: str, what: str) -> Problem:
    near = catalogue.nearest(name)
    fix = f"the nearest: {', '.join(near)}; " if near else ""
    return Problem(what, fix=f"{fix}`lora params --list` shows the catalogue, and a model's folder works too")
