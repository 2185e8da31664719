"""Trackers: TensorBoard, W&B, MLflow and trackio, through Accelerate's classes for them. A row of TRACKERS each.

They are told the settings once, the figures of steps and evaluations, and samples. A row calls the
package itself where Accelerate's class is unfit: it makes a second run of TensorBoard's settings at each start, MLflow
drops samples for being text, and trackio needs an end of its own.

A tracker never ends a run: the first error makes one warning, and the tracker hears no more. None of them sends usage
figures home, as some would by default, nor what W&B collects by itself: command line, host, git remotes.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli.errors import Problem, RecipeError, first_line
from lora_cli.train.events import Evaluated, Event, Sampled, Step

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

log = logging.getLogger(__name__)

PROJECT = "lora"  # where a tracker's own environment variable names none
Metrics = dict[str, float]


@dataclass(frozen=True)
class Tracked:
    """What trackers are told of a run besides its events. `settings` hold no secrets."""

    folder: Path
    id: str
    settings: Mapping[str, Any]
    log_steps: int = 1
    resumed_at: int | None = None  # the step behind which all comes again

    @property
    def resumed(self) -> bool:
        return self.resumed_at is not None

    @property
    def name(self) -> str:
        return self.folder.resolve().name


@dataclass(frozen=True)
class Tracker:
    """`open` gives Accelerate's tracker before its start, `tell` hands it the settings, `say` samples at a step."""

    package: str
    open: Callable[[Tracked], "GeneralTracker"]
    tell: Callable[["GeneralTracker", Tracked], None]
    say: Callable[["GeneralTracker", Mapping[str, str], int], None]
    environment: Mapping[str, str] = field(default_factory=dict)  # what is set where the user has set nothing
    close: Callable[["GeneralTracker"], None] = lambda tracker: tracker.finish()


def check_trackers(names: list[str]) -> None:
    """Raise RecipeError for trackers whose packages are missing: before a run loads anything."""
    missing = [name for name in names if find_spec(TRACKERS[name].package) is None]
    if missing:
        raise RecipeError(*map(_missing, missing))


@contextmanager
def open_tracker(name: str, run: Tracked) -> Iterator[Callable[[Event], None]]:
    """A function that tells the tracker what happens; it raises nothing."""
    row = TRACKERS[name]
    for variable, value in row.environment.items():
        os.environ.setdefault(variable, value)
    careful = _Careful(name)
    tracker = careful(_started, row, run)

    def write(event: Event) -> None:
        careful(_tell, row, tracker, event, run.log_steps)

    try:
        yield write
    finally:
        careful(row.close, tracker)


def metrics_of(event: Event) -> Metrics:
    """The figures of a step or an evaluation under the names that trackers group by: `train/loss`, `eval/loss` …"""
    match event:
        case Step():
            return _flat("train", event.as_json())
        case Evaluated():
            return _flat("eval", event.as_json())
    return {}


def _missing(name: str) -> Problem:
    what = f"`training.trackers: [{name}]` needs the package `{TRACKERS[name].package}`"
    return Problem(what, fix=f"pip install 'lora-cli[{name}]', or leave the tracker out")


class _Careful:
    """Calls until one fails; then says so once, and calls no more."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.works = True

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if not self.works:
            return None
        try:
            with redirect_stdout(sys.stderr):  # stdout is for results, and trackio prints
                return function(*arguments)
        except Exception as error:  # whatever it is: the run goes on
            self.works = False
            log.warning("%s is told nothing more: %s", self.name, first_line(error))
            return None


def _started(row: Tracker, run: Tracked) -> "GeneralTracker":
    tracker = row.open(run)
    tracker.start()
    row.tell(tracker, run)
    return tracker


def _tell(row: Tracker, tracker: "GeneralTracker", event: Event, log_steps: int) -> None:
    if isinstance(event, Sampled):
        row.say(tracker, event.samples, event.step)
    elif (metrics := metrics_of(event)) and not (isinstance(event, Step) and event.step % log_steps):
        tracker.log(metrics, step=event.step)


def _flat(group: str, values: Mapping[str, Any]) -> Metrics:
    """Numbers alone, those of an inner mapping under its name."""
    found: Metrics = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(f"{group}/{name}", value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and name not in ("step", "seconds"):
            found[f"{group}/{name}"] = value
    return found


def _tensorboard(run: Tracked) -> "GeneralTracker":
    from accelerate.tracking import TensorBoardTracker

    again = {"purge_step": run.resumed_at + 1} if run.resumed_at is not None else {}
    return TensorBoardTracker("tensorboard", logging_dir=run.folder, **again)


def _wandb(run: Tracked) -> "GeneralTracker":
    from accelerate.tracking import WandBTracker

    return WandBTracker(
        os.environ.get("WANDB_PROJECT", PROJECT),
        name=run.name,
        id=run.id,
        resume="allow",
        dir=run.folder,
        settings={"x_disable_meta": True, "disable_git": True, "disable_code": True, "console": "off"},
    )


def _mlflow(run: Tracked) -> "GeneralTracker":
    """Where MLFLOW_TRACKING_URI says, else where MLflow does: a database in the current folder, which `mlflow ui` shows."""
    from accelerate.tracking import MLflowTracker

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    tag = {"lora.run": run.id}
    return MLflowTracker(name, run_name=run.name, tags=tag, run_id=_mlflow_run(name, run) if run.resumed else None)


def _mlflow_run(experiment: str, run: Tracked) -> str | None:
    """The id of the run that an earlier session began."""
    import mlflow

    found = mlflow.search_runs(
        experiment_names=[experiment], filter_string=f"tags.`lora.run` = '{run.id}'", output_format="list"
    )
    return found[0].info.run_id if found else None


def _trackio(run: Tracked) -> "GeneralTracker":
    from accelerate.tracking import TrackioTracker

    return TrackioTracker(
        os.environ.get("TRACKIO_PROJECT", PROJECT), name=f"{run.name}-{run.id[:8]}", resume="allow", embed=False
    )


def _settings_as_text(tracker: "GeneralTracker", run: Tracked) -> None:
    lines = [f"    {key}: {value}" for key, value in run.settings.items()]
    tracker.log({"settings": "\n".join(lines)}, step=0)


def _settings_once(tracker: "GeneralTracker", run: Tracked) -> None:
    """Nothing in a later session: MLflow refuses a setting that has changed."""
    if not run.resumed:
        tracker.store_init_configuration({key: str(value) for key, value in run.settings.items()})


def _settings(tracker: "GeneralTracker", run: Tracked) -> None:
    tracker.store_init_configuration(dict(run.settings))


def _as_text(tracker: "GeneralTracker", samples: Mapping[str, str], step: int) -> None:
    tracker.log({f"samples/{place}": _markdown(*sample) for place, sample in enumerate(samples.items(), 1)}, step=step)


def _markdown(prompt: str, answer: str) -> str:
    """Both as blocks of code, which holds whatever they say."""
    return "\n".join(f"    {line}" for line in [*f"> {prompt}".splitlines(), "", *answer.splitlines()])


def _as_wandb_table(tracker: "GeneralTracker", samples: Mapping[str, str], step: int) -> None:
    tracker.log_table("samples", columns=["prompt", "answer"], data=[list(pair) for pair in samples.items()], step=step)


def _as_trackio_table(tracker: "GeneralTracker", samples: Mapping[str, str], step: int) -> None:
    import trackio

    rows = trackio.Table(columns=["prompt", "answer"], data=[list(pair) for pair in samples.items()])
    tracker.log({"samples": rows}, step=step)


def _close_trackio(tracker: "GeneralTracker") -> None:
    """Its own end, for after that of the run alone it would do it again when Python ends."""
    import trackio

    trackio.finish()


def _as_file(tracker: "GeneralTracker", samples: Mapping[str, str], step: int) -> None:
    import mlflow

    mlflow.log_dict(dict(samples), f"samples/step-{step:07d}.json")


TRACKERS = {
    "tensorboard": Tracker("tensorboard", _tensorboard, _settings_as_text, _as_text),
    "wandb": Tracker("wandb", _wandb, _settings, _as_wandb_table, {"WANDB_ERROR_REPORTING": "false"}),
    "mlflow": Tracker("mlflow", _mlflow, _settings_once, _as_file, {"MLFLOW_DISABLE_TELEMETRY": "true"}),
    "trackio": Tracker(
        "trackio", _trackio, _settings, _as_trackio_table, {"GRADIO_ANALYTICS_ENABLED": "False"}, _close_trackio
    ),
}
