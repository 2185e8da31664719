"""`lora sweep`: a recipe with several values of some keys, a run for each combination, and what came of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_cli.cli.options import JsonOption, RecipeArgument, SetOption
from lora_cli.errors import Problem, RecipeError
from lora_cli.signals import GRACE_SECONDS

if TYPE_CHECKING:
    from lora_cli.runs.outcomes import Outcome, Planned


def sweep(
    recipe: RecipeArgument,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2", help="Values of a key, such as lora.r=4,8,16; repeated, all combinations."),
    ] = None,
    set_: SetOption = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the runs go; else the recipe's `output` with -sweep.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a sweep: what has finished stays, the rest continues.")
    ] = False,
    together: Annotated[
        bool,
        typer.Option("--together", help="Train all runs at once, in shared forwards: equal to rounding, not in bytes."),
    ] = False,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds from a signal to the end, for steps to be saved.")
    ] = GRACE_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Train a recipe with several values of some keys and compare what comes of them.

    Example: lora sweep recipe.yaml --grid lora.r=4,8,16 --grid training.learning_rate=1e-4,3e-4
    """
    from lora_cli.recipe.grid import grid as combinations
    from lora_cli.recipe.grid import read_trials

    if not grid:
        raise RecipeError(Problem("a sweep needs values to try", fix="write `--grid lora.r=4,8,16`"))
    trials = combinations(grid)
    loaded = read_trials(recipe, set_ or [], trials)
    output = out or _beside(loaded[0].recipe.output)
    from lora_cli.runs.sweep import check_free, planned

    plans = planned(output, trials, loaded)
    check_free(output, plans, resume=resume)
    signal = _train(output, recipe, plans, resume=resume, joint=together, grace=grace)
    _tell(output, recipe, plans, as_json=as_json)
    if signal:
        _leave(signal)


def _beside(output: str) -> Path:
    path = Path(output)
    return path.with_name(f"{path.name}-sweep")


def _train(
    out: Path, recipe: Path, plans: "Sequence[Planned]", *, resume: bool, joint: bool, grace: float
) -> int | None:
    """All runs; the signal that interrupted them, if one did."""
    from lora_cli.cli.console import told_once
    from lora_cli.cli.sweeping import Display
    from lora_cli.cli.tokenizing import tokenizing
    from lora_cli.runs.outcomes import read_outcome, write_sweep
    from lora_cli.runs.sweep import can_join, held, one_by_one, prepare_all, together
    from lora_cli.signals import noted

    with held(out, plans, resume=resume) as holds:
        with tokenizing() as progress, told_once():
            runs = prepare_all(plans, progress)
        if joint:
            can_join(runs)
        with noted(grace) as signals, Display(plans, runs) as display:
            for hold in holds:
                hold.begin()
            write_sweep(out, recipe, [read_outcome(plan) for plan in plans])
            stopped = {"asked_to_stop": lambda: signals.received is not None}
            train = together if joint else one_by_one
            for run, error in train(runs, display.show, resume=resume, **stopped):
                display.ended(run, error)
                write_sweep(out, recipe, [read_outcome(plan) for plan in plans])
        return signals.received


def _tell(out: Path, recipe: Path, plans: "Sequence[Planned]", *, as_json: bool) -> None:
    """The comparison; ends with the exit code of the sweep where that is not 0."""
    from lora_cli.cli.console import show_json
    from lora_cli.runs.outcomes import exit_code, ranked, read_outcome, write_sweep
    from lora_cli.runs.sweep_page import write_sweep_page

    outcomes = [read_outcome(plan) for plan in plans]
    document = write_sweep(out, recipe, outcomes)
    write_sweep_page(out, outcomes)
    if as_json:
        show_json(document)
    else:
        _show(out, ranked(outcomes))
    if code := exit_code(outcomes):
        raise SystemExit(code)


def _show(out: Path, outcomes: "Sequence[Outcome]") -> None:
    from lora_cli.cli.console import duration, number, plain_table, show
    from lora_cli.cli.console import out as stdout
    from lora_cli.runs.outcomes import PAGE, loss_name

    table = plain_table("run", loss_name(outcomes), "best step", "steps", "parameters", "time")
    for outcome in outcomes:
        table.add_row(
            outcome.name,
            _or_dash(outcome.loss, "{:.4f}".format),
            _or_dash(outcome.best_step, str),
            f"{outcome.step}" if outcome.state == "finished" else f"{outcome.step} ({outcome.state})",
            _or_dash(outcome.parameters, number),
            _or_dash(outcome.seconds, duration),
        )
    stdout.print(table)
    best = outcomes[0]
    if best.first_loss is not None:
        show(f"before training the held-out loss is {best.first_loss:.4f}")
    show(f"page: {out / PAGE}")
    if best.state == "finished":
        show(f"best: {best.folder}")


def _or_dash(value: float | None, form: Callable[[float], str]) -> str:
    return "–" if value is None else form(value)


def _leave(number: int) -> None:
    from signal import Signals

    from lora_cli.cli.console import note
    from lora_cli.runs.lock import command_to_resume
    from lora_cli.signals import exit_code

    note(f"interrupted by {Signals(number).name}; continue with")
    note(command_to_resume())
    raise SystemExit(exit_code(number))
