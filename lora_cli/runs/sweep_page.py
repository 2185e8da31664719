"""sweep.html: the runs of a sweep on one page, made of their folders: what came of each, the curves, what each value did."""

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from lora_cli.runs.charts import Chart, Line, chart, curve_lines
from lora_cli.runs.folder import RunFolder, write_text
from lora_cli.runs.history import mean, read_history
from lora_cli.runs.lock import command_to_resume
from lora_cli.runs.outcomes import PAGE, Outcome, loss_name, ranked
from lora_cli.runs.pages import render
from lora_cli.wording import compact, duration, number

DRAWN = 6  # runs whose curves are drawn: as many as there are colours


def write_sweep_page(out: Path, outcomes: Sequence[Outcome]) -> None:
    write_text(out / PAGE, sweep_page(ranked(outcomes)))


def sweep_page(outcomes: Sequence[Outcome]) -> str:
    """Of the outcomes, the best first."""
    done = [outcome for outcome in outcomes if outcome.loss is not None]
    drawn = done[:DRAWN]
    best = outcomes[0] if outcomes[0].state == "finished" else None
    return render(
        "sweep.html.jinja",
        _charts(drawn),
        title="sweep · lora",
        headline=_headline(outcomes, best),
        tiles=_tiles(outcomes, best),
        columns=[loss_name(outcomes), "best step", "steps", "parameters", "time"],
        rows=[{"name": each.name, "error": each.error, "cells": _cells(each)} for each in outcomes],
        drawn=len(drawn),
        more=len(done) - len(drawn),
        what=loss_name(outcomes),
        effects=_effects([outcome for outcome in done if outcome.state == "finished"]),
        best=quote(best.folder) if best else None,
        command=command_to_resume(),
    )


def _headline(outcomes: Sequence[Outcome], best: Outcome | None) -> str:
    if best is None or best.loss is None:
        return "No run has finished."
    before = f", from {best.first_loss:.3f} before training" if best.first_loss is not None else ""
    return f"{best.name} has the lowest {loss_name(outcomes)}: {best.loss:.3f}{before}."


def _tiles(outcomes: Sequence[Outcome], best: Outcome | None) -> list[tuple[str, str, str]]:
    finished = [outcome for outcome in outcomes if outcome.state == "finished"]
    tiles = [("runs finished", f"{len(finished)} of {len(outcomes)}", "")]
    if best and best.loss is not None:
        spread = f"to {finished[-1].loss:.3f}" if len(finished) > 1 else ""
        tiles += [
            (loss_name(outcomes), f"{best.loss:.4f}", spread),
            ("best step", "–" if best.best_step is None else f"{best.best_step:,}", f"of {best.step:,}"),
            ("trained parameters", compact(best.parameters or 0), "of the best"),
        ]
    return tiles


def _cells(outcome: Outcome) -> list[str]:
    state = "" if outcome.state == "finished" else f" ({outcome.state})"
    return [
        "–" if outcome.loss is None else f"{outcome.loss:.4f}",
        "–" if outcome.best_step is None else f"{outcome.best_step:,}",
        f"{outcome.step:,}{state}",
        "–" if outcome.parameters is None else number(outcome.parameters),
        "–" if outcome.seconds is None else duration(outcome.seconds),
    ]


def _charts(outcomes: Sequence[Outcome]) -> list[Chart]:
    histories = [(outcome.name, read_history(RunFolder(Path(outcome.folder)).events)) for outcome in outcomes]
    last = max((history.last_step for _, history in histories), default=0)
    held_out = [Line(name, f"c{place}", history.evaluated()) for place, (name, history) in enumerate(histories)]
    # of each curve the smoothed one alone: several raw ones over each other can't be told apart
    trained = [
        Line(name, f"c{place}", curve_lines("", "", history.curve("loss"))[-1].points)
        for place, (name, history) in enumerate(histories)
    ]
    found = [
        chart("Held-out loss", "nats a token", held_out, last=last, format=compact),
        chart("Training loss", "nats a token", trained, last=last, format=compact, wide=True),
    ]
    return [each for each in found if each]


def _effects(outcomes: Sequence[Outcome]) -> list[tuple[str, list[tuple[Any, ...]]]]:
    """For each key that has several values: value, number of runs, their best and their mean loss."""
    found = []
    for key in dict.fromkeys(key for outcome in outcomes for key in outcome.settings):
        losses: dict[str, list[float]] = {}
        for outcome in outcomes:
            losses.setdefault(outcome.settings[key], []).append(outcome.loss)
        rows = [(value, str(len(of)), f"{min(of):.4f}", f"{mean(of):.4f}") for value, of in losses.items()]
        found += [(key, rows)] if 1 < len(rows) <= len(outcomes) / 2 or len(outcome.settings) == 1 else []
    return found
