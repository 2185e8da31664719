"""The run as a person watches it: what will be trained, a live line of progress, and what came of it."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_cli.cli.console import animated, bytes_text, duration, err, inert, note, number, plain_table, show
from lora_cli.models.recompute import described, recompute_of
from lora_cli.runs.decision import Decision
from lora_cli.runs.diagnosis import Finding
from lora_cli.runs.facts import next_commands
from lora_cli.runs.parts import Run
from lora_cli.runs.report import read_report
from lora_cli.runs.resume import pair
from lora_cli.train.checkpoint import Learned
from lora_cli.train.events import (
    Complete,
    Evaluated,
    Event,
    Finished,
    Memory,
    OutOfMemory,
    Relaid,
    Resumed,
    Sampled,
    Saved,
    Skipped,
    Spike,
    Started,
    Step,
)
from lora_cli.train.layout import Layout

MOST_FINDINGS = 3  # of the diagnosis, at the end
PLAIN_LINES = 20  # about so many step lines where there is no terminal to animate


class Display(AbstractContextManager):
    """Consumes the events of a run. On a terminal, a bar with loss, rate and time left; elsewhere, plain lines."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.evaluations: list[Evaluated] = []
        self.finished: Finished | None = None
        self.first: Step | None = None  # what came before it, an evaluation perhaps, says nothing about the time left
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=err,
            disable=not animated() or err.no_color,  # NO_COLOR: no animation either
        )
        self.task = self.bar.add_task("training", total=run.plan.steps, figures="")

    def __enter__(self) -> Self:
        self._introduce()
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, event: Event) -> None:
        match event:
            case Started():
                self.bar.update(self.task, completed=event.step)
            case Resumed():
                note(f"continuing after step {event.step}")
                for key, (then, now) in event.changed.items():
                    note(f"changed: {key}, {pair(then, now)}", style="yellow")
            case Complete():
                self.bar.stop()
                note(f"the run has finished already, at step {event.step}, and nothing has changed: nothing to do")
            case Step():
                self._step(event)
            case Memory():
                predicted, found = bytes_text(event.predicted_bytes), bytes_text(event.measured_bytes)
                note(f"memory of a step: {found}, predicted {predicted}", style="dim")
            case Relaid():
                layout, recompute = (
                    Layout(event.micro_batch_size, event.row_length),
                    recompute_of(event.gradient_checkpointing),
                )
                note(
                    f"that is {event.factor:.2f} times what was predicted to come and go: from step {event.step + 1} on, "
                    f"{_forward(layout)}, checkpointing {described(recompute)}"
                )
            case Evaluated():
                self.evaluations.append(event)
                note(f"step {event.step:>5}  held-out loss {event.loss:.4f}  {_measured(event)}", style="bold")
                for source, loss in event.sources.items():
                    note(f"            {loss:.4f}  {inert(source)}")
            case Sampled():
                for prompt, answer in event.samples.items():
                    note(f"  > {inert(prompt)}\n    {inert(answer)}")
            case Skipped():
                back = (
                    "" if event.rewound_to is None else f", and the weights are those of step {event.rewound_to} again"
                )
                note(f"warning: step {event.step} is left out{back}: {event.reason}", style="yellow")
                note(f"  rows {inert(event.rows)}", style="yellow")
            case Spike():
                note(
                    f"warning: step {event.step} has a gradient norm of {event.grad_norm:.3g}, the median is "
                    f"{event.median:.3g}\n  rows {inert(event.rows)}",
                    style="yellow",
                )
            case OutOfMemory():
                layout = Layout(event.micro_batch_size, event.row_length)
                note(
                    f"warning: out of memory in step {event.step}; taken again, and all from here on, with "
                    f"{_forward(layout)}; the rows of a step stay the same",
                    style="yellow",
                )
            case Saved():
                note(f"saved step {event.step}", style="dim")
            case Finished():
                self.finished = event
                self.bar.stop()

    def show_result(self, learned: Learned) -> None:
        """What came of it, and what to try next, on stdout."""
        finished, folder = self.finished, self.run.folder.path
        show(
            f"{finished.step} steps in {duration(finished.seconds)} ({finished.reason}), peak memory {bytes_text(finished.peak_bytes)}"
        )
        if finished.adapter_step != finished.step:
            show(f"the {self.kind} is that of step {finished.adapter_step}, where the held-out loss was lowest")
        if len(self.evaluations) > 1:
            before, after = self.evaluations[0], self._evaluation_of_the_result()
            figures = [f"held-out loss {before.loss:.4f} → {after.loss:.4f}"]
            figures += [
                f"{_named(name)} {before.metrics[name]:.3f} → {found:.3f}" for name, found in after.metrics.items()
            ]
            figures += [] if after.metrics else [f"perplexity {before.perplexity:.1f} → {after.perplexity:.1f}"]
            show(", ".join(figures))
        unchanged = "" if self.run.config is None else "; the base is unchanged"
        show(
            f"{self.kind}: {folder}, {number(learned.parameters)} parameters; read back equal to what was trained{unchanged}"
        )
        for line in diagnosis_lines(read_report(self.run.folder).findings):
            show(line)
        show(f"report: {self.run.folder.report}")
        show("")
        show("next:")
        for command in next_commands(folder, self.run.folder.read_record()):
            show(f"  {command}")

    @property
    def kind(self) -> str:
        """Of what is learned."""
        return "model" if self.run.config is None else "adapter"

    def _evaluation_of_the_result(self) -> Evaluated:
        found = [event for event in self.evaluations if event.step == self.finished.adapter_step]
        return found[-1] if found else self.evaluations[-1]

    def _introduce(self) -> None:
        run, budget = self.run, self.run.budget
        table = plain_table("module", "shape", "r", "modules", "parameters")
        for row in budget.rows:
            table.add_row(
                row.module,
                f"{row.out_features} × {row.in_features}",
                str(row.r),
                str(row.count),
                number(row.parameters),
            )
        for module in budget.whole:
            table.add_row(module.module, "new, whole" if module.new else "whole", "", "1", number(module.parameters))
        err.print(table)
        scale = f", scale {run.config.scale:g}" if run.config else ""
        note(f"trains {budget} parameters{scale}, {self.kind} {bytes_text(budget.adapter_bytes)}")
        note(f"data: {inert(run.rows.report.summary())}")
        if run.rows.held_out:
            note(f"held out: {len(run.rows.held_out):,} examples")
        training, processes = run.recipe.training, run.accelerator.num_processes
        note(
            f"{run.plan.steps:,} steps of {training.global_batch_size} rows on {processes} × {run.accelerator.device.type}, "
            f"{_forward(run.settings.layout)}, {str(run.dtype).removeprefix('torch.')}"
            f"{_recomputed(run.decision)}"
        )

    def _step(self, step: Step) -> None:
        figures = f"loss {step.loss:.3f}  lr {step.lr:.1e}  {step.tokens_per_second:,.0f} tokens/s"
        self.bar.update(self.task, completed=step.step, figures=figures)
        every = max(self.run.recipe.training.log_steps, self.run.plan.steps // PLAIN_LINES)
        if self.bar.disable and (step.step % every == 0 or step.step in (1, self.run.plan.steps)):
            note(f"step {step.step:>5}/{self.run.plan.steps}  {figures}{self._left(step)}")
            sys.stderr.flush()

    def _left(self, step: Step) -> str:
        self.first = self.first or step
        done, left = step.step - self.first.step, self.run.plan.steps - step.step
        return f"  {duration((step.seconds - self.first.seconds) / done * left)} left" if done and left else ""


def diagnosis_lines(findings: Sequence[Finding]) -> list[str]:
    """The most pressing findings, one a line; what went well needs no advice."""
    shown = [finding for finding in findings if finding.level != "good"][:MOST_FINDINGS]
    return [f"{'!' if finding.level == 'problem' else '·'} {inert(finding.line())}" for finding in shown]


def _measured(event: Evaluated) -> str:
    """What says most beside the loss: the objective's own figures, else the perplexity."""
    figures = [f"{_named(name)} {value:.4f}" for name, value in event.metrics.items()]
    return "  ".join(figures) or f"perplexity {event.perplexity:.2f}"


def _named(metric: str) -> str:
    return metric.replace("_", "-").replace("f1", "F1")


def _recomputed(decided: Decision) -> str:
    return f", checkpointing {described(decided.recompute)}" if decided.recompute else ""


def _forward(layout: Layout) -> str:
    if layout.row_length is None:
        return f"{layout.micro_batch_size} rows a forward"
    return f"packed: {layout.micro_batch_size} × {layout.row_length} tokens a forward"
