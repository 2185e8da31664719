"""What came of the runs of a sweep, as their folders say it: side by side, the best first, and in sweep.json."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.errors import DivergedError
from lora_cli.recipe.grid import Trial
from lora_cli.recipe.reader import LoadedRecipe
from lora_cli.runs.facts import get
from lora_cli.runs.folder import RunFolder, write_json
from lora_cli.runs.history import number, read_history
from lora_cli.runs.lock import command

RECORD, PAGE = "sweep.json", "sweep.html"
GIVEN_UP = "given up"  # by a search: the state of such a run, and the reason in its record


@dataclass(frozen=True)
class Planned:
    """A run of a sweep before anything is made of it."""

    trial: Trial
    loaded: LoadedRecipe
    folder: RunFolder


@dataclass(frozen=True)
class Outcome:
    """What a run's folder says of it. `loss` is that of the adapter which is its result, held out where there are such
    rows; `state` is `finished`, `interrupted`, `waiting`, `given up` by a search, or how it was broken off."""

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


def trials_of(out: Path) -> list[Trial]:
    """What sweep.json says was tried, in the order of the names."""
    found = json.loads((out / RECORD).read_text(encoding="utf-8"))
    return sorted((Trial(run["name"], run["settings"]) for run in found["runs"]), key=lambda trial: trial.name)


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


def loss_name(outcomes: Sequence[Outcome]) -> str:
    """What the loss of these runs is."""
    return "held-out loss" if any(each.first_loss is not None for each in outcomes) else "training loss"


def _state(record: Mapping[str, Any], finished: bool) -> str:
    if not record:
        return "waiting"
    if code := number(get(record, "result", "exit_code")):
        return "diverged" if code == DivergedError.code else "broken off"
    if get(record, "result", "reason") == GIVEN_UP:
        return GIVEN_UP
    return "finished" if finished and get(record, "adapter", "sha256") else "interrupted"
