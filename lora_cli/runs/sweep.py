"""A sweep: the runs of a grid, each in a run folder of its own, and what came of them side by side.

    out-sweep/
      r=4,learning_rate=1e-4/     an ordinary run folder: `lora eval`, `merge`, `report` and `train --resume` know it
      r=8,learning_rate=1e-4/
      sweep.json                  what was tried and what came of it, written anew whenever a run ends
      sweep.html                  the same on one page, with the curves

All runs are prepared before the first one trains, so a mistake in the last one costs no time of the others. What the
folders say is what counts: a sweep that was killed goes on with `--resume`, and whatever has finished stays.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from lora_cli.data.pipeline import OnTokenized
from lora_cli.errors import Problem, RecipeError, StorageError, UserError
from lora_cli.lora.inject import remove
from lora_cli.lora.joint import join, mixes_rows
from lora_cli.models.shared import LoadModel, loaded_once, shared_copy
from lora_cli.objectives.table import EACH
from lora_cli.recipe.grid import Trial
from lora_cli.recipe.reader import LoadedRecipe, with_output
from lora_cli.recipe.schema import objective_of
from lora_cli.runs.folder import Hold, RunFolder
from lora_cli.runs.outcomes import GIVEN_UP, RECORD, Planned
from lora_cli.runs.parts import Run
from lora_cli.runs.report import tell_end, told_if_broken_off
from lora_cli.runs.train import execute, finish, prepare
from lora_cli.train.events import Event, Finished
from lora_cli.train.task import Learn
from lora_cli.train.together import Table, train_together

Show = Callable[[Run, Event], None]


def planned(out: Path, trials: Sequence[Trial], loaded: Sequence[LoadedRecipe]) -> list[Planned]:
    """Where each run lies."""
    return [
        Planned(trial, with_output(recipe, str(out / trial.name)), RunFolder(out / trial.name))
        for trial, recipe in zip(trials, loaded, strict=True)
    ]


def check_free(out: Path, plans: Sequence[Planned], *, resume: bool) -> None:
    """Raise StorageError where another sweep or run lies or is at work, or where there is none to resume."""
    if out.exists() and not out.is_dir():
        raise StorageError(Problem("the output is a file", where=str(out), fix="give a folder with `--out`"))
    if not resume and out.is_dir() and any(out.iterdir()):
        fix = "continue that sweep with `--resume`, or write elsewhere with `--out`"
        raise StorageError(Problem("the output folder is not empty", where=str(out), fix=fix))
    if resume and not (out / RECORD).is_file():
        what = f"there is no sweep to resume: no {RECORD}"
        raise StorageError(Problem(what, where=str(out), fix="give the sweep's folder with `--out`"))
    for plan in plans:
        plan.folder.check_free(resume=resume, overwrite=False)


@contextmanager
def held(out: Path, plans: Sequence[Planned], *, resume: bool) -> Iterator[list[Hold]]:
    """Keep every other run out of all the folders; where no run begins, nothing stays of them."""
    with ExitStack() as stack:
        if not out.exists():
            stack.callback(_remove_if_empty, out)
        yield [stack.enter_context(plan.folder.held(resume=resume, overwrite=False)) for plan in plans]


def prepare_all(
    plans: Sequence[Planned],
    progress: OnTokenized | None = None,
    load: LoadModel | None = None,
    *,
    resume: bool = False,
) -> list[Run]:
    """The parts of every run, over one base where they have the same. Raises with the problems of all runs at once."""
    load, runs, errors = load or loaded_once(), [], []
    for plan in plans:
        try:
            runs.append(prepare(plan.loaded, plan.folder, progress, resume=resume, load=load))
        except UserError as error:
            errors.append(error)
    if errors:
        raise type(errors[0])(*dict.fromkeys(problem for error in errors for problem in error.problems))
    return runs


def one_by_one(
    runs: Sequence[Run], show: Show, *, resume: bool, asked_to_stop: Callable[[], bool]
) -> Iterator[tuple[Run, UserError | None]]:
    """Train them in their order; yields each as it ends, with its error. A run that fails leaves the others alone."""
    for run in runs:
        if asked_to_stop():
            return
        error = None
        try:
            follow(run, show, resume=resume, asked_to_stop=asked_to_stop)
        except UserError as found:
            error = found
        yield run, error


def together(
    runs: Sequence[Run], show: Show, *, resume: bool, asked_to_stop: Callable[[], bool]
) -> list[tuple[Run, UserError | None]]:
    """Train them at the same time, in forwards that they share. A run that ends or fails leaves the others alone."""
    acts = [partial(follow, run, show, resume=resume, asked_to_stop=asked_to_stop) for run in runs]
    errors = train_together(table_of(runs), acts)
    for error in errors:
        if error and not isinstance(error, UserError):
            raise error
    return list(zip(runs, errors, strict=True))


def can_join(runs: Sequence[Run]) -> None:
    """Raise RecipeError for runs that can't share a forward, with the reason."""
    for run in runs:
        if reason := _alone(run, runs[0]):
            what = f"these runs can't be trained together: {reason}"
            raise RecipeError(Problem(what, where=str(run.folder.path), fix="leave out `--together`"))


def _alone(run: Run, first: Run) -> str | None:
    """Why a run can't share its forwards with the first one."""
    if run.config is None:
        return "every weight of the base is trained, so that there is none to share"
    if run.model.get_input_embeddings().weight is not first.model.get_input_embeddings().weight:
        return "they have different bases, or the same in different forms"
    if _objective(run) != _objective(first):
        return "some write text, and some classify"
    if path := mixes_rows(run.model):
        return f"{path} projects distances between tokens too, once for the rows of all runs"
    if run.accelerator.num_processes > 1:
        return "each is trained by several processes"
    return None


def _objective(run: Run) -> str:
    return objective_of(run.recipe.training).kind


def table_of(runs: Sequence[Run]) -> Table:
    """A model over the weights that all of them have, with the adapters of all of them side by side.

    It computes again in the backward what a run computes again, if any does.
    """
    model = shared_copy(next((run for run in runs if run.decision.recompute), runs[0]).model)
    remove(model)
    groups = join(model, [run.model for run in runs])
    return Table(model, EACH[_objective(runs[0])], groups, runs[0].accelerator.device, _at_once(runs))


def _at_once(runs: Sequence[Run]) -> int:
    """How many fit into one forward, by what a step of each is predicted to need beside what stands."""
    plans = [run.decision.planned for run in runs if run.decision.planned]
    if not plans:
        return len(runs)
    coming = max(plan.needed - plan.memory.standing for plan in plans)
    standing = plans[0].memory.weights + sum(plan.memory.standing - plan.memory.weights for plan in plans)
    room = min(run.decision.room for run in runs)
    return int(min(len(runs), max(1, (room - standing) // max(coming, 1))))


def give_up(plan: Planned) -> None:
    """A run that a search has interrupted says so."""
    tell_end(plan.folder, {"reason": GIVEN_UP})


def follow(
    run: Run, show: Show, learn: Learn | None = None, *, resume: bool, asked_to_stop: Callable[[], bool]
) -> None:
    """One run of a sweep from its first event to its result."""
    event = None
    for event in execute(run, resume=resume, asked_to_stop=asked_to_stop, learn=learn):
        show(run, event)
    if isinstance(event, Finished):
        with told_if_broken_off(run.folder):
            finish(run, event)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
