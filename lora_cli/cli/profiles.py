"""Launch profiles: Accelerate's config files, as far as they say how many processes there are, where they meet, and whether
each holds the whole base (DDP) or a shard of it (FSDP2).

A name is looked for in ./configs/launch first, then among the profiles that come with `lora`. What a file asks for and
would not get is refused.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.errors import Problem, RecipeError, SafetyError
from lora_cli.recipe.document import MOST_BYTES, Document, KeyPath, Source, parse, shown, visible
from lora_cli.train.sharding import BLOCKS, IN_PROFILE, VERSION, Sharding, class_names

FOLDER = Path("configs/launch")
SHARE = Path("share/lora/launch")
PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Profile:
    """`num_processes` is per machine, None where it is left out; a file counts them over all machines."""

    num_processes: int | None = None
    num_machines: int = 1
    main_process_ip: str = "localhost"
    main_process_port: int = 0  # any free one
    sharding: Sharding | None = None


LEAST = {"num_processes": 1, "num_machines": 1, "main_process_port": 0}
KNOWN = (*LEAST, "main_process_ip")
KINDS = ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP")
FSDP = "fsdp_config"

# Keys without effect here -> the values that ask for nothing
NEUTRAL = {
    "compute_environment": ("local_machine",),
    "debug": ("false",),
    "distributed_type": tuple(map(str.lower, KINDS)),
    "downcast_bf16": ("no", "false"),
    "enable_cpu_affinity": ("false",),
    "gpu_ids": ("all",),
    "machine_rank": ("0",),
    "main_training_function": ("main",),
    "mixed_precision": ("no",),
    "rdzv_backend": ("static", "c10d"),
    "same_network": ("true", "false"),
    "tpu_env": (),
    "tpu_use_cluster": ("false",),
    "tpu_use_sudo": ("false",),
    "use_cpu": ("false",),
}
FIXES = {
    "distributed_type": "use MULTI_GPU (data parallel), FSDP (base and adapter in shards) or NO",
    "gpu_ids": "remove it, and choose the GPUs with CUDA_VISIBLE_DEVICES",
    "machine_rank": "remove it: the machines number themselves",
    "mixed_precision": "remove it, and set `model.dtype` in the recipe",
    "use_cpu": 'remove it; CUDA_VISIBLE_DEVICES="" hides the GPUs',
}


def read_profile(profile: str) -> Profile:
    """The profile of a name, or of a .yaml file; RecipeError with all that is wrong in it."""
    file = _find(profile)
    values, document = parse(Source(str(file), _text(file)))
    if values is None:
        return Profile()
    if not isinstance(values, dict):
        what, fix = "a launch profile is a block of `key: value`, and this is not", "name a launch profile"
        raise RecipeError(Problem(what, where=visible(str(file)), fix=fix))
    problems = [finding.problem for finding in document.findings]
    problems += [document.keys[path].problem(what, fix).problem for path, what, fix in _wrongs(values)]
    if problems:
        raise RecipeError(*problems)
    return _profile(values, document)


def profile_folders(package: Path = PACKAGE) -> list[Path]:
    """The user's own, the one beside the package in a checkout, and share/ of the installation around it."""
    return [FOLDER, package.parent / FOLDER, *(above / SHARE for above in list(package.parents)[:4])]


def _find(profile: str) -> Path:
    if profile.endswith((".yaml", ".yml")):
        named = [Path(profile)]
    else:
        named = [folder / f"{profile}.yaml" for folder in profile_folders()]
    if found := next((file for file in named if file.is_file()), None):
        return found
    there = ", ".join(sorted({path.stem for folder in profile_folders() for path in folder.glob("*.yaml")})) or "none"
    raise RecipeError(
        Problem(
            f"no launch profile `{shown(profile)}`",
            where=visible(str(named[0])),
            fix=f"profiles here: {there}; or give a .yaml file",
        )
    )


def _text(file: Path) -> str:
    where = visible(str(file))
    try:
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            what = f"a launch profile has at most {MOST_BYTES // 1_000_000} MB, and this file has more"
            raise SafetyError(Problem(what, where=where, fix="name a launch profile"))
        return content.decode("utf-8-sig")
    except OSError as error:
        what = f"the launch profile can't be read: {error.strerror}"
        raise RecipeError(Problem(what, where=where, fix="make it readable for you")) from None
    except UnicodeDecodeError:
        raise RecipeError(
            Problem("the launch profile is not UTF-8 text", where=where, fix="save it as UTF-8")
        ) from None


def _wrongs(values: dict[str, Any]) -> Iterator[tuple[KeyPath, str, str]]:
    """The place of each entry that would not be followed, what is wrong with it, and the fix."""
    for key, value in values.items():
        if key == FSDP and isinstance(value, dict):
            yield from (((FSDP, inner), *wrong) for inner, v in value.items() if (wrong := _wrong_shards(inner, v)))
        elif wrong := _wrong(key, value):
            yield (key,), *wrong
    sharded, config = _is_sharded(values), values.get(FSDP)
    if sharded and not (isinstance(config, dict) and VERSION.name in config):
        yield ("distributed_type",), f"`distributed_type: FSDP` needs `{FSDP}`", f"add `{FSDP}: {{{VERSION.name}: 2}}`"
    if config and not sharded:
        yield (FSDP,), f"`{FSDP}` has no effect without `distributed_type: FSDP`", "set that, or remove the block"


def _is_sharded(values: dict[str, Any]) -> bool:
    return str(values.get("distributed_type")).lower() == "fsdp"


def _wrong_shards(key: str, value: Any) -> tuple[str, str] | None:
    if key not in IN_PROFILE:
        return f"`{shown(key)}` of `{FSDP}` is not known here", f"remove it; known are {', '.join(IN_PROFILE)}"
    known = IN_PROFILE[key]
    done = value is None or (isinstance(value, str) and (known.values is None or value.lower() in known.values))
    return None if done else (f"`{key}: {_said(value)}` is not supported", known.fix)


def _wrong(key: str, value: Any) -> tuple[str, str] | None:
    """What is wrong with an entry, and the fix. Values are text as written; null and empty blocks ask for nothing."""
    if value in (None, [], {}):
        return None
    if key in LEAST:
        right = isinstance(value, str) and re.fullmatch(r"[0-9]{1,6}", value) and int(value) >= LEAST[key]
        if right and not (key == "main_process_port" and int(value) > 65535):
            return None
        return (
            f"`{key}: {_said(value)}` is not a number of the right size",
            f"write a whole number, {LEAST[key]} or more",
        )
    if key in KNOWN:
        return None if isinstance(value, str) else (f"`{key}` is not a name", "write a host name or an address")
    if key not in NEUTRAL:
        return f"`{shown(key)}` of the launch profile is not known here", f"remove it; keep {', '.join((*KNOWN, FSDP))}"
    if isinstance(value, str) and value.lower() in NEUTRAL[key]:
        return None
    return f"`{key}: {_said(value)}` of the launch profile has no effect here", FIXES.get(key, "remove it")


def _said(value: Any) -> str:
    return shown(value) if isinstance(value, str) else "…"


def _profile(values: dict[str, Any], document: Document) -> Profile:
    given = {key: value for key in KNOWN if (value := values.get(key)) is not None}
    numbers = {key: int(value) for key, value in given.items() if key in LEAST}
    problems = list(_of_many_machines(given | numbers, document))
    if problems:
        raise RecipeError(*problems)
    if "num_processes" in numbers:
        numbers["num_processes"] //= numbers.get("num_machines", 1)
    blocks = class_names((values.get(FSDP) or {}).get(BLOCKS.name) or "")
    return Profile(**given | numbers, sharding=Sharding(blocks) if _is_sharded(values) else None)


def _of_many_machines(given: dict[str, Any], document: Document) -> Iterator[Problem]:
    machines = given.get("num_machines", 1)
    if machines == 1:
        return
    if given.get("num_processes", machines) % machines:
        what = f"{given['num_processes']} processes are not the same number on each of {machines} machines"
        yield document.keys[("num_processes",)].problem(what, "count them over all machines").problem
    if not (given.get("main_process_ip") and given.get("main_process_port")):
        what, fix = f"{machines} machines need a place to meet", "set `main_process_ip` and `main_process_port`"
        yield document.keys[("num_machines",)].problem(what, fix).problem
