"""`lora sweep`: a recipe with several values of some keys, a run for each combination, and what came of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_cli.cli.options import JsonOption, RecipeArgument, SetOption
from lora_cli.errors import Problem, RecipeError
from lora_cli.signals import GRACE_SECONDS

if TYPE_CHECKING:
    from lora_cli.models.shared import LoadModel
    from lora_cli.recipe.grid import Space
    from lora_cli.recipe.reader import LoadedRecipe
    from lora_cli.runs.outcomes import Outcome, Planned
    from lora_cli.runs.parts import Run
    from lora_cli.runs.search import Search
    from lora_cli.train.events import Event


def sweep(
    recipe: RecipeArgument,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2", help="Values of a key, such as lora.r=4,8,16; repeated, all combinations."),
    ] = None,
    search: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=LOW..HIGH", help="A range or values to choose from, such as lora.r=4,8,16; may be repeated."
        ),
    ] = None,
    trials: Annotated[int, typer.Option(metavar="N", min=1, max=1000, help="Runs of a search.")] = 20,
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
        float, typer.Option(metavar="SECONDS", min=0, help="From a signal to the end, for steps to be saved.")
    ] = GRACE_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Train a recipe with several values of keys, and compare.

    Example: lora sweep recipe.yaml --grid lora.r=4,8,16 --grid training.learning_rate=1e-4,3e-4
    """
    from lora_cli.recipe.grid import corners, read_trials, space
    from lora_cli.recipe.grid import grid as combinations

    if bool(grid) == bool(search):
        what = "a sweep needs values to try" if not grid else "`--grid` and `--search` exclude each other"
        raise RecipeError(Problem(what, fix="write `--grid lora.r=4,8,16`, or `--search lora.r=4..64`"))
    if search and together:
        what = "a search learns from each run before it begins the next, and can't train them together"
        raise RecipeError(Problem(what, fix="leave out `--together`, or use `--grid`"))
    choices = space(search or [])
    tried = corners(choices) if search else combinations(grid)
    loaded = read_trials(recipe, set_ or [], tried, "--search" if search else "--grid")
    from lora_cli.cli.console import told_once
    from lora_cli.runs.sweep import check_free, planned

    output = out or _beside(loaded[0].recipe.output)
    plans = [] if search else planned(output, tried, loaded)
    check_free(output, plans, resume=resume)
    session = _Session(output, recipe, set_ or [], resume, grace)
    with told_once():
        if search:
            plans, signal = session.search(choices, loaded[0], trials)
        else:
            signal = session.train(plans, joint=together)
    _tell(output, recipe, plans, as_json=as_json)
    if signal:
        _leave(signal)


def _beside(output: str) -> Path:
    path = Path(output)
    return path.with_name(f"{path.name}-sweep")


@dataclass
class _Session:
    """What all runs of this command have in common."""

    out: Path
    recipe: Path
    set_: list[str]
    resume: bool
    grace: float

    def train(
        self,
        plans: "Sequence[Planned]",
        *,
        joint: bool = False,
        load: "LoadModel | None" = None,
        search: "Search | None" = None,
        earlier: "Sequence[Planned]" = (),
    ) -> int | None:
        """All runs; the signal that interrupted them, if one did. A `search` hears of their events and may give one up."""
        from lora_cli.cli.sweeping import Display
        from lora_cli.cli.tokenizing import tokenizing
        from lora_cli.runs.sweep import can_join, held, one_by_one, prepare_all, together
        from lora_cli.signals import noted

        with held(self.out, plans, resume=self.resume) as holds:
            with tokenizing() as progress:
                runs = prepare_all(plans, progress, load, resume=self.resume)
            if joint:
                can_join(runs)
            with noted(self.grace) as signals, Display(plans, runs) as display:
                for hold in holds:
                    hold.begin()
                self.note([*earlier, *plans])

                def show(run: "Run", event: "Event") -> None:
                    display.show(run, event)
                    if search:
                        search.report(event)

                def stop() -> bool:
                    return signals.received is not None or (search is not None and search.given_up)

                train = together if joint else one_by_one
                for run, error in train(runs, show, resume=self.resume, asked_to_stop=stop):
                    display.ended(run, error)
                    self.note([*earlier, *plans])
            return signals.received

    def search(self, choices: "Space", first: "LoadedRecipe", most: int) -> "tuple[list[Planned], int | None]":
        """Run after run, each chosen by what came of those before; the signal that interrupted them, if one did."""
        from lora_cli.models.shared import loaded_once
        from lora_cli.recipe.grid import read_trials
        from lora_cli.runs.outcomes import read_outcome, trials_of
        from lora_cli.runs.search import Search, check_search
        from lora_cli.runs.sweep import give_up, planned

        check_search(first.recipe)
        search, load = Search(choices, first.recipe.training.seed), loaded_once()
        known = trials_of(self.out) if self.resume else []
        plans = planned(self.out, known, read_trials(self.recipe, self.set_, known, "--search"))
        plans = [plan for plan in plans if search.remember(read_outcome(plan))]
        signal = None
        while search.number < most and not signal:
            trials = [search.ask()]
            [plan] = planned(self.out, trials, read_trials(self.recipe, self.set_, trials, "--search"))
            signal = self.train([plan], load=load, search=search, earlier=plans)
            if search.given_up and not signal:
                give_up(plan)
            search.tell(read_outcome(plan))
            plans.append(plan)
        return plans, signal

    def note(self, plans: "Sequence[Planned]") -> None:
        """What has come of the runs so far, for who looks, and for a session that goes on."""
        from lora_cli.runs.outcomes import read_outcome, write_sweep

        write_sweep(self.out, self.recipe, [read_outcome(plan) for plan in plans])


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
    from lora_cli.cli.console import duration, number, plain_table, show, show_table
    from lora_cli.runs.outcomes import PAGE, loss_name

    table = plain_table("run", loss_name(outcomes), "best at", "steps", "parameters", "time")
    table.columns[0].no_wrap = True
    for outcome in outcomes:
        table.add_row(
            outcome.name,
            _or_dash(outcome.loss, "{:.4f}".format),
            _or_dash(outcome.best_step, str),
            f"{outcome.step}" if outcome.state == "finished" else f"{outcome.step} ({outcome.state})",
            _or_dash(outcome.parameters, number),
            _or_dash(outcome.seconds, duration),
        )
    show_table(table)
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
