"""Where a base model's files are: a folder, a hub id, or a GGUF file, all brought to one folder of safetensors.

Configs are read here as data before any library acts on them: foreign code is refused, but for what `trust.py` knows of.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lora_cli.errors import ModelError, Problem, SafetyError
from lora_cli.limits import read_json
from lora_cli.models.trust import AUTO_MAP, FLAG, approve, code_files, named_commit, to_trust

log = logging.getLogger(__name__)

HUB_PAGE = "https://huggingface.co/{name}"
HUB_WEIGHTS = "*.safetensors"  # no other form
# What a config and a tokenizer need, and the licence that a merged model takes along
HUB_FILES = [
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "LICENSE*",
    "NOTICE*",
]
HUB_CODE = "*.py"  # where the user trusts it
# A second copy of the weights, other formats in folders of their own, and adapters
HUB_LEFT_OUT = ["consolidated*", "*/*", "adapter_*"]

# What transformers reads beside the weights and the vocabulary
CONFIGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "processor_config.json",
)
CODE_KEYS = ("custom_code", "custom_generate", "trust_remote_code")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# `repository--module.Class`, transformers' way to name code of another repository
CODE_ELSEWHERE = re.compile(r"\S+--[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
NAMES = ("_name_or_path", "name_or_path")
# How many of something a model is built of, part by part, and the most that is believed
MOST_LAYERS, MOST_EXPERTS = 2_000, 20_000
COUNTS = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"), MOST_LAYERS),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "num_encoder_layers"), MOST_LAYERS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), MOST_EXPERTS),
}


@dataclass(frozen=True)
class Base:
    """A base model on this machine: `name` as the user wrote it, `revision` the commit that a hub id resolved to."""

    name: str
    folder: Path
    revision: str | None = None


def resolve_base(name: str, revision: str | None = None, *, weights: bool = True) -> Base:
    """Find a base's files, downloading or converting where needed; without `weights`, of the hub config and tokenizer alone.

    Raises ModelError or SafetyError.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        base = Base(name, _converted(path))
    elif path.is_dir():
        base = Base(name, path)
    elif path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(_no_such_base(name))
    else:
        named = named_commit(name)
        files = [*HUB_FILES, *([HUB_WEIGHTS] if weights else []), *([HUB_CODE] if named else [])]
        folder = hub_folder(name, revision or named, files)
        base = Base(name, folder, revision=folder.name)
    _check_config(base)
    return base


def read_config(folder: Path) -> dict:
    """config.json as plain data. Raises SafetyError for sizes that would keep this machine busy for ever."""
    try:
        config = read_json(folder / "config.json", fix="download the model again")
    except FileNotFoundError as error:
        hint = (
            "an adapter is given with `--adapter`"
            if (folder / "adapter_config.json").exists()
            else "give a folder that `save_pretrained` wrote"
        )
        raise ModelError(Problem("no config.json: this is no model folder", where=str(folder), fix=hint)) from error
    for path, value in _entries(config):
        most = COUNTS.get(path[-1])
        if most is not None and type(value) in (int, float) and not 0 <= value <= most:
            what = f"`{'.'.join(path)}: {value}` is no number of parts that a model has: {most:,} is the most here"
            raise SafetyError(Problem(what, where=str(folder / "config.json"), fix="don't use this model"))
    return config


def quantised_on_disk(folder: Path) -> str | None:
    """What a base's own files are quantised with (`gptq`, `torchao` …); None where they hold plain numbers."""
    found = read_config(folder).get("quantization_config")
    return str(found.get("quant_method") or "bitsandbytes") if isinstance(found, dict) else None


def refuse_twice(folder: Path, quantize: str) -> None:
    """Raise ModelError where a base that is quantised on disk should be quantised again."""
    if quantize != "none" and (method := quantised_on_disk(folder)):
        what = f"`model.quantize: {quantize}` quantises 16-bit weights, and the base's are quantised already ({method})"
        fix = "leave `model.quantize` out to train beside them as they are, or give the 16-bit original"
        raise ModelError(Problem(what, where=str(folder / "config.json"), fix=fix))


def refuse_foreign_code(folder: Path) -> None:
    """Raise SafetyError where a config beside a model or a tokenizer asks for code that is not transformers' own.

    `auto_map` says which code there is, and whether a model can do without is for `_check_code`.
    """
    for name in CONFIGS:
        with suppress(FileNotFoundError):
            for path, value in _entries(read_json(folder / name)):
                if _asks_for_code(path[-1], value) and AUTO_MAP not in path:
                    what = f"it asks for code from elsewhere: `{'.'.join(path)}`"
                    raise SafetyError(
                        Problem(what, where=str(folder / name), fix="don't use it; foreign code is never run")
                    )


def _entries(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """Every value inside JSON with the names that lead to it."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*path, str(key)), inner
        yield from _entries(inner, (*path, str(key)))


def _asks_for_code(key: str, value: object) -> bool:
    if key in CODE_KEYS:
        return value not in (None, False)
    if key.lstrip("_").startswith("attn_implementation"):
        return not (value is None or isinstance(value, bool | dict) or value in ATTENTIONS)
    return isinstance(value, str) and key not in NAMES and CODE_ELSEWHERE.fullmatch(value) is not None


def _check_config(base: Base) -> None:
    config = read_config(base.folder)
    where = str(base.folder / "config.json")
    if (base.folder / "adapter_config.json").exists():
        raise ModelError(
            Problem(
                "the base's folder holds an adapter too, and which of the two is meant is not clear",
                where=str(base.folder),
                fix="give a folder with the base alone",
            )
        )
    if "vision_config" in config or "audio_config" in config:
        raise ModelError(
            Problem(
                f"{base.name} is a vision-language or audio model, and `lora` trains text models",
                where=where,
                fix="give its text-only sibling as `model.base`",
            )
        )
    refuse_foreign_code(base.folder)
    if AUTO_MAP in config:
        _check_code(base, config.get("model_type"))
    elif named_commit(base.name):
        log.warning("%s is not needed: %s brings no code", FLAG, base.name)


def _check_code(base: Base, model_type: object) -> None:
    """Raise SafetyError for a base that can't do without its own code, which the user has not named."""
    if _known_to_transformers(model_type):
        log.warning(
            "%s brings its own code (`auto_map`): ignored, transformers' own `%s` is used", base.name, model_type
        )
    elif approve(base.name, base.folder, base.revision):
        files = ", ".join(path.name for path in code_files(base.folder))
        log.warning("%s: code of %s is run: %s", FLAG, base.name, files)
    else:
        raise SafetyError(
            Problem(
                f"{base.name} brings its own code (`auto_map`), and transformers has no `{model_type}` itself",
                where=str(base.folder / "config.json"),
                fix="use a model that transformers has; or read its *.py files, all of them, and run them as yourself with "
                f"`{to_trust(base.name, base.folder, base.revision)}`",
            )
        )


def _known_to_transformers(model_type: object) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def _converted(path: Path) -> Path:
    from lora_cli.models.gguf import converted_folder

    if not path.is_file():
        raise ModelError(_no_such_base(str(path)))
    return converted_folder(path)


def hub_folder(name: str, revision: str | None, files: list[str]) -> Path:
    """The snapshot of a hub id in the hub's cache, with `files` (patterns) downloaded where they are missing.

    Raises ModelError for a gated, private or missing model, for no such revision, and where the hub can't be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = HUB_PAGE.format(name=name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns=HUB_LEFT_OUT))
    except GatedRepoError as error:
        what = f"{name} is gated, and no token with access to it was given"
        fix = f"accept its licence at {page}, then run `hf auth login` or set HF_TOKEN"
        raise ModelError(Problem(what, where=page, fix=fix)) from error
    except RevisionNotFoundError as error:
        fix = "give a branch, tag or commit of it as `model.revision`"
        raise ModelError(Problem(f"{name} has no revision {revision!r}", where=page, fix=fix)) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        fix = "check the spelling; for a private model run `hf auth login` or set HF_TOKEN"
        raise ModelError(Problem(f"the hub has no model {name}, or it is private", where=page, fix=fix)) from error
    except (HfHubHTTPError, OSError) as error:  # OSError: no network, and nothing in the cache
        what = f"{name} is neither a folder here nor in the hub's cache, and the hub can't be reached"
        fix = f"give a folder, or connect and download it once (a gated model asks for its licence at {page})"
        raise ModelError(Problem(what, where=page, fix=fix)) from error


def _no_such_base(name: str) -> Problem:
    return Problem(
        f"no model folder, GGUF file or hub id {name!r}",
        fix="`model.base` and `--base` take a folder, a .gguf file, or a hub id such as `Qwen/Qwen3-0.6B`",
    )
