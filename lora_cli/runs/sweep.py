"""A sweep: the runs of a grid, each in a run folder of its own, and what came of them side by side.

    out-sweep/
      r=4,learning_rate=1e-4/     an ordinary run folder: `lora eval`, `merge`, `report` and `train --resume` know it
      r=8,learning_rate=1e-4/
      sweep.json                  what was tried and what came of it, written anew whenever a run ends
      sweep.html                  the same on one page, with the curves

All runs are prepared before the first one trains, so a mistake in the last one costs no time of the others. What the
folders say is what counts: a sweep that was killed goes on with `--resume`, and whatever has finished stays.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lora_cli.data.pipeline import OnTokenized
from lora_cli.errors import DivergedError, Problem, RecipeError, StorageError, UserError
from lora_cli.lora.inject import remove
from lora_cli.lora.joint import join
from lora_cli.lora.whole import whole_modules
from lora_cli.models.shared import loaded_once, shared_copy
from lora_cli.objectives.table import OBJECTIVES
from lora_cli.recipe.grid import Trial
from lora_cli.recipe.reader import LoadedRecipe, with_output
from lora_cli.recipe.schema import objective_of
from lora_cli.runs.facts import get
from lora_cli.runs.folder import Hold, RunFolder, write_json
from lora_cli.runs.history import number, read_history
from lora_cli.runs.lock import command
from lora_cli.runs.parts import Run
from lora_cli.runs.report import told_if_broken_off
from lora_cli.runs.train import execute, finish, prepare
from lora_cli.train.events import Event, Finished
from lora_cli.train.task import Learn, Task
from lora_cli.train.together import Table, train_together

RECORD, PAGE = "sweep.json", "sweep.html"

Show = Callable[[Run, Event], None]


@dataclass(frozen=True)
class Planned:
    """A run of a sweep before anything is made of it."""

    trial: Trial
    loaded: LoadedRecipe
    folder: RunFolder


@dataclass(frozen=True)
class Outcome:
    """What a run's folder says of it. `loss` is that of the adapter which is its result, held out where there are such
    rows; `state` is `finished`, `interrupted`, `waiting`, or how it was broken off."""

    name: str
    settings: Mapping[str, str]
    folder: str
    state: str
    error: str | None
    exit_code: int
    step: int
    steps: int | None
    best_step: int | None  # of the lowest held-out loss after a step
    loss: float | None
    first_loss: float | None  # held out, before the first step
    train_loss: float | None  # over the last ten steps
    parameters: int | None
    seconds: float | None
    peak_bytes: float | None


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


def prepare_all(plans: Sequence[Planned], progress: OnTokenized | None = None) -> list[Run]:
    """The parts of every run, over one base where they have the same. Raises with the problems of all runs at once."""
    load, runs, errors = loaded_once(), [], []
    for plan in plans:
        try:
            runs.append(prepare(plan.loaded, plan.folder, progress, load))
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
    errors = train_together(_table(runs), acts)
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
    base, weight = next(iter(run.model.parameters())), next(iter(first.model.parameters()))
    if base is not weight:
        return "they have different bases, or the same in different forms"
    if objective_of(run.recipe.training).kind != "sft":
        return "their rows are classified, each run by a head of its own"
    if whole_modules(run.model):
        return "modules are trained whole"
    if run.accelerator.num_processes > 1:
        return "each is trained by several processes"
    return None


def _table(runs: Sequence[Run]) -> Table:
    """A model over the weights that all of them have, with the adapters of all of them side by side.

    It computes again in the backward what a run computes again, if any does.
    """
    model = shared_copy(next((run for run in runs if run.decision.recompute), runs[0]).model)
    remove(model)
    groups = join(model, [run.model for run in runs])
    return Table(Task(model, OBJECTIVES["sft"]), groups, runs[0].accelerator.device, _at_once(runs))


def _at_once(runs: Sequence[Run]) -> int:
    """How many fit into one forward, by what a step of each is predicted to need beside what stands."""
    plans = [run.decision.planned for run in runs if run.decision.planned]
    if not plans:
        return len(runs)
    coming = max(plan.needed - plan.memory.standing for plan in plans)
    standing = plans[0].memory.weights + sum(plan.memory.standing - plan.memory.weights for plan in plans)
    room = min(run.decision.room for run in runs)
    return int(min(len(runs), max(1, (room - standing) // max(coming, 1))))


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


def read_outcome(plan: Planned) -> Outcome:
    """What the folder of a run says, whoever trained it, and whenever."""
    record, history = plan.folder.read_record(), read_history(plan.folder.events)
    result = get(record, "result") or {}
    held_out = history.evaluated()
    trained = [(step, loss) for step, loss in held_out if step > 0]
    chosen = number(result.get("adapter_step")) or history.last_step
    loss = next((loss for step, loss in held_out if step == chosen), held_out[-1][1] if held_out else None)
    train_loss = number(result.get("train_loss"))
    return Outcome(
        name=plan.trial.name,
        settings=plan.trial.settings,
        folder=str(plan.folder.path),
        state=_state(record, history.finished is not None),
        error=result.get("error"),
        exit_code=int(number(result.get("exit_code")) or 0),
        step=history.last_step,
        steps=history.planned_steps,
        best_step=min(trained, key=lambda point: point[1])[0] if trained else None,
        loss=loss if held_out else train_loss,
        first_loss=held_out[0][1] if held_out else None,
        train_loss=train_loss,
        parameters=get(record, "parameters", "trainable"),
        seconds=number(result.get("seconds")),
        peak_bytes=number(result.get("peak_bytes")),
    )


def ranked(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The lowest loss first; runs that did not finish come behind those that did."""
    return sorted(outcomes, key=lambda o: (o.state != "finished", o.loss is None, o.loss or 0.0))


def write_sweep(out: Path, recipe: Path, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """sweep.json: the runs, the best first."""
    found = {"recipe": str(recipe), "command": command(), "runs": [vars(outcome) for outcome in ranked(outcomes)]}
    write_json(out / RECORD, found)
    return found


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 where there is something to compare: a run that diverges is an answer, too. Any other failure is told."""
    failed = [outcome.exit_code for outcome in outcomes if outcome.exit_code]
    if any(outcome.state == "finished" for outcome in outcomes):
        failed = [code for code in failed if code != DivergedError.code]
    return failed[0] if failed else 0


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _state(record: Mapping[str, Any], finished: bool) -> str:
    if not record:
        return "waiting"
    if code := number(get(record, "result", "exit_code")):
        return "diverged" if code == DivergedError.code else "broken off"
    return "finished" if finished and get(record, "adapter", "sha256") else "interrupted"
