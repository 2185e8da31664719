"""Continuing a run: from its newest whole checkpoint, and only with what it was started with."""

from torch.optim import Optimizer

from lora_cli.data.pipeline import fingerprint
from lora_cli.errors import Problem, RecipeError
from lora_cli.runs.parts import Run
from lora_cli.train.checkpoint import newest_checkpoint, restore
from lora_cli.train.loop import Progress
from lora_cli.train.optim import Parameters

# Changing these between a run and its continuation changes nothing that was trained.
FREE_TO_CHANGE = (
    "training.save_steps",
    "training.keep_checkpoints",
    "training.log_steps",
    "training.trackers",
    "training.max_time",
    "training.sample_prompts",
)
# The fingerprints of the examples that came from them stand for these.
SOURCES = ("data.train", "data.eval")


def continued(run: Run, optimizer: Optimizer, parameters: Parameters) -> Progress:
    """The progress of the newest whole checkpoint, restored; a fresh one where the run never saved."""
    checkpoint = newest_checkpoint(run.folder.checkpoints)
    if checkpoint is None:
        return Progress()
    now = comparable(run)
    changed = [key for key in now if checkpoint.settings.get(key) != now[key]]
    if changed:
        raise RecipeError(
            *(
                Problem(
                    f"`{key}` has changed since the run was started: {checkpoint.settings.get(key)!r} then, {now[key]!r} now",
                    where=str(run.folder.recipe),
                    fix="put it back, or start a new run with `--out`",
                )
                for key in changed
            )
        )
    restore(checkpoint, run.model, optimizer, parameters)
    return checkpoint.progress


def comparable(run: Run) -> dict[str, object]:
    """What must be the same for a run to be continued: the recipe's values, the base and the rows."""
    blocks = run.recipe.model_dump(mode="json", exclude={"output"})
    values = {f"{block}.{key}": value for block, found in blocks.items() for key, value in found.items()}
    kept = {key: value for key, value in values.items() if key not in (*FREE_TO_CHANGE, *SOURCES)}
    return kept | {
        "dtype": str(run.dtype),  # what `auto` came to
        "base": run.fingerprint.short,
        "training rows": fingerprint(run.rows.train),
        "held-out rows": fingerprint(run.rows.held_out),
    }
