"""Continuing a run: from its newest whole checkpoint, and only with what it was started with.

Three things are alike and not the same:

    --resume                                    the same run goes on: with nothing changed, to the same bytes
    --resume, with more epochs or steps         the run is extended: from here on the learning rate follows the schedule
                                                of the longer run, and steps done are not done again
    `lora.start_from: FOLDER`                   a new run begins at the factors of an adapter, with step 0 and no memory
"""

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from lora_cli.data.encoder import tokenizer_fingerprint
from lora_cli.data.examples import fingerprint
from lora_cli.errors import DataError, ModelError, Problem, RecipeError, UserError
from lora_cli.lora.base_files import Fingerprint
from lora_cli.lora.peft_format import load_adapter
from lora_cli.models.save import weights_digest
from lora_cli.recipe.spelling import near
from lora_cli.runs.parts import Run
from lora_cli.train.checkpoint import Checkpoint, newest_checkpoint

log = logging.getLogger(__name__)

# Changing these between a run and its continuation changes nothing that was trained.
FREE_TO_CHANGE = (
    "training.save_steps",
    "training.keep_checkpoints",
    "training.log_steps",
    "training.trackers",
    "training.max_time",
    "training.sample_prompts",
)
# What a step computes with: other ones, other bytes
LIBRARIES = ("lora-cli", "torch", "transformers", "bitsandbytes")
LENGTH = ("training.epochs", "training.max_steps")
BASE = "model.base"
# What the checkpoint's own tensors depend on: with another value it is another run
FIXED = (
    "lora.r",
    "lora.targets",
    "lora.exclude",
    "lora.layers",
    "lora.rank_pattern",
    "lora.use_dora",
    "lora.freeze_A",
    "lora.bias",
    "lora.trainable_tokens",
    "lora.new_tokens",
    "lora.init",
    "lora.modules_to_save",
    "training.method",
    "training.objective",
    "training.optimizer",
)
# What makes forwards of other sizes, so that those of the checkpoint say nothing
LAYOUT = ("processes", "device", "data.packing", "data.max_length", "training.micro_batch_size")
# What machines of one run may have otherwise
OF_A_MACHINE = ("threads", "cpu")
# Reasons to end that hold for good; after `max_time` there is more to do
FINAL = ("all steps", "early stopping")
# The class of the error, where it is not the recipe's
ERRORS: Mapping[str, type[UserError]] = {
    "data.train": DataError,
    "data.eval": DataError,
    BASE: ModelError,
    "tokenizer": ModelError,
}
MEANING = {
    "data.train": "the training rows, as the tokenizer renders them,",
    "data.eval": "the held-out rows",
    BASE: "the fingerprint of the base",
    "tokenizer": "the tokenizer or its chat template",
    "processes": "the number of processes",
    "threads": "the number of threads",
    "cpu": "what the processor can do",
    "device": "the device",
    "versions": "the version of a library",
}


@dataclass(frozen=True)
class Continuation:
    """Where a run goes on, and what is not as it was then: by key, (then, now)."""

    checkpoint: Checkpoint
    changed: Mapping[str, tuple[object, object]]


def continuation(run: Run, allowed: Collection[str]) -> Continuation | None:
    """From the newest whole checkpoint; None where the run never saved.

    Raises, by name, for everything that would make the result another one, unless it is `allowed`.
    """
    now = comparable(run)
    if unknown := [name for name in allowed if name not in now]:
        what = f"`--allow-change {unknown[0]}` names nothing that a run is compared by"
        raise RecipeError(Problem(what, fix=_meant(unknown[0], now)))
    checkpoint = newest_checkpoint(run.folder.checkpoints)
    if checkpoint is None:
        return None
    then = checkpoint.settings
    changed = {key: (then.get(key), now[key]) for key in now if then.get(key) != now[key]}
    _refuse(run, changed, allowed, done=checkpoint.progress.step)
    return Continuation(checkpoint, changed)


def comparable(run: Run) -> dict[str, object]:
    """What must be the same for a run to be continued to the same bytes, by the name that `--allow-change` takes."""
    blocks = run.recipe.model_dump(mode="json", exclude={"output"})
    values = {f"{block}.{key}": value for block, found in blocks.items() for key, value in found.items()}
    return {key: value for key, value in values.items() if key not in FREE_TO_CHANGE} | {
        BASE: run.fingerprint.short,
        "model.dtype": str(run.dtype).removeprefix("torch."),  # what `auto` came to
        "data.train": fingerprint(run.rows.train),
        "data.eval": fingerprint(run.rows.held_out),
        "tokenizer": tokenizer_fingerprint(run.tokenizer),
        "steps": run.plan.steps,
        "processes": run.accelerator.num_processes,
        "device": run.accelerator.device.type,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "versions": {name: installed(name) for name in LIBRARIES},
    }


def installed(name: str) -> str | None:
    """The version of a package, None where it is not installed, as `lora` itself in a clone."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def shared(settings: Mapping[str, object]) -> dict[str, object]:
    """What all processes of a run have in common, on whatever machine."""
    return {key: value for key, value in settings.items() if key not in OF_A_MACHINE}


def is_complete(run: Run, found: Continuation) -> bool:
    """Whether the run came to its end with nothing changed since, and its adapter or its model lies in the folder."""
    record = run.folder.read_record()
    result, done = record.get("result", {}), found.checkpoint.progress.step
    if found.changed or result.get("reason") not in FINAL or result.get("step") != done:
        return False
    try:
        if run.recipe.training.full:
            return weights_digest(run.folder.path) == record["model"]["sha256"]
        return load_adapter(run.folder.path).digest() == record["adapter"]["sha256"]
    except UserError:
        return False


def _refuse(run: Run, changed: Mapping[str, tuple], allowed: Collection[str], *, done: int) -> None:
    where = str(run.folder.recipe)
    longer = "steps" in changed and changed["steps"][1] > changed["steps"][0]
    if "steps" in changed and changed["steps"][1] < done:
        what = f"{done} steps are done, and the recipe takes {changed['steps'][1]} now"
        raise RecipeError(Problem(what, where=where, fix="put it back, or start a new run with `--out`"))
    refused = {
        key: _problem(key, pair(then, now) + (_tensors(run) if key == BASE else ""), where)
        for key, (then, now) in changed.items()
        if key in FIXED or not (key in allowed or key == "steps" or (longer and key in LENGTH))
    }
    if refused:
        causes = sorted(refused, key=lambda key: key in ERRORS)  # a key of the recipe may be why rows are others
        raise ERRORS.get(causes[0], RecipeError)(*(refused[key] for key in causes))


def _problem(key: str, change: str, where: str) -> Problem:
    if key in FIXED:
        fix = "put it back, or start a new run with `--out`; `lora.start_from` begins it at this run's adapter"
    else:
        fix = f"put it back, start a new run with `--out`, or accept another result with `--allow-change {key}`"
    return Problem(f"{_named(key)} has changed since the run was started: {change}", where=where, fix=fix)


def _tensors(run: Run) -> str:
    """In which tensors the base is another than the one the run was started on."""
    found = run.folder.read_record().get("base")
    known = Fingerprint.from_record(found.get("fingerprint")) if isinstance(found, dict) else None
    names = known.differences(run.fingerprint) if known else []
    return f"; they differ in {', '.join(names[:3])}" if names else ""


def _named(key: str) -> str:
    return f"`{key}` ({MEANING[key]})" if key in MEANING else f"`{key}`"


def pair(then: object, now: object) -> str:
    """`3 then, 4 now`; of mappings what differs, of hashes their beginning."""
    if isinstance(then, dict) and isinstance(now, dict):
        differ = [name for name in now if then.get(name) != now[name]]
        return ", ".join(f"{name} {pair(then.get(name), now[name])}" for name in differ)
    return f"{_short(then)} then, {_short(now)} now"


def _short(value: object) -> str:
    text = repr(value) if not isinstance(value, str) else value
    return text[:12] if len(text) == 64 else text


def _meant(name: str, names: Iterable[str]) -> str:
    meant = near(name, names, cutoff=0.6)
    return f"write `--allow-change {meant}`" if meant else "name a key of the recipe, or one of " + ", ".join(MEANING)
