"""The runs of a sweep as a person watches them: a bar for each that is at work, a line for each that has ended."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from lora_cli.cli.console import animated, duration, err, inert, note, number
from lora_cli.errors import UserError, first_line
from lora_cli.runs.outcomes import Planned
from lora_cli.runs.parts import Run
from lora_cli.train.events import Complete, Evaluated, Event, Finished, OutOfMemory, Resumed, Skipped, Started, Step


class Display(AbstractContextManager):
    """Consumes the events of all runs, each with the run that it is of."""

    def __init__(self, plans: Sequence[Planned], runs: Sequence[Run]) -> None:
        self.names = {id(run): plan.trial.name for plan, run in zip(plans, runs, strict=True)}
        self.width = max(map(len, self.names.values()))
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            console=err,
            disable=not animated(),
        )
        self.bars = {
            id(run): self.bar.add_task(self._name(run), total=run.plan.steps, figures="", visible=False) for run in runs
        }
        if len(runs) > 1:
            note(f"{len(runs)} runs over {runs[0].base.name}; data: {inert(runs[0].rows.report.summary())}")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, run: Run, event: Event) -> None:
        match event:
            case Started():
                self.bar.update(self.bars[id(run)], completed=event.step, visible=True)
                self._say(run, f"{number(event.parameters)} parameters, {event.steps:,} steps")
            case Resumed():
                self._say(run, f"continuing after step {event.step}")
            case Complete():
                self._say(run, f"has finished already, at step {event.step}")
            case Step():
                figures = f"loss {event.loss:.3f}  lr {event.lr:.1e}"
                self.bar.update(self.bars[id(run)], completed=event.step, figures=figures)
            case Evaluated():
                self._say(run, f"step {event.step:>5}  held-out loss {event.loss:.4f}")
            case Skipped():
                self._say(run, f"step {event.step} is left out: {event.reason}", style="yellow")
            case OutOfMemory():
                self._say(run, f"out of memory in step {event.step}: taken again in smaller forwards", style="yellow")
            case Finished():
                self._say(run, f"{event.step} steps in {duration(event.seconds)} ({event.reason})")

    def ended(self, run: Run, error: UserError | None) -> None:
        self.bar.update(self.bars[id(run)], visible=False)
        if error:
            self._say(run, first_line(error).removeprefix("error: "), style="red")

    def _say(self, run: Run, what: str, style: str = "dim") -> None:
        note(f"{self._name(run)}  {inert(what)}", style=style)

    def _name(self, run: Run) -> str:
        return f"{self.names[id(run)]:<{self.width}}"
