"""`lora train`: read the recipe, train, and show what happens."""

from pathlib import Path
from typing import Annotated

import typer

from lora_cli.cli.options import RecipeArgument, SetOption, TrustOption
from lora_cli.errors import Problem, RecipeError
from lora_cli.signals import GRACE_SECONDS


def train(
    recipe: RecipeArgument,
    set_: SetOption = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Run folder, instead of the recipe's `output`.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in the folder from its newest checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Move an old run in the folder aside and start anew.")
    ] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD", help="With --resume: go on though this has changed; may be repeated."),
    ] = None,
    grace: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="From a signal to the end, for the step to be saved.")
    ] = GRACE_SECONDS,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the resolved recipe, the budget and the planned steps; train nothing."),
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Processes on this machine; default: every visible GPU, else 1."),
    ] = None,
    on: Annotated[
        str | None, typer.Option(metavar="PROFILE", help="Where to run: a name from configs/launch/, or a file.")
    ] = None,
    trust_remote_code: TrustOption = None,
) -> None:
    """Train an adapter as a recipe says.

    Example: lora train configs/llama7b-qv.yaml --set lora.r=16
    """
    from lora_cli.recipe.reader import read_recipe, with_output

    if resume and overwrite:
        fix = "leave one out: the first continues the old run, the second moves it aside"
        raise RecipeError(Problem("`--resume` and `--overwrite` contradict each other", fix=fix))
    if allow_change and not resume:
        raise RecipeError(
            Problem("`--allow-change` belongs to `--resume`: a new run may have anything", fix="leave it out")
        )
    loaded = read_recipe(recipe, set_ or [])
    if out:
        loaded = with_output(loaded, str(out))
    if dry_run:
        from lora_cli.cli.dry_run import show_dry_run

        show_dry_run(loaded)
        return
    from lora_cli.runs.folder import RunFolder

    folder = RunFolder(Path(loaded.recipe.output))
    from lora_cli.cli.launch import join_others, run_as_workers
    from lora_cli.cli.worker import is_first_worker, is_worker

    join_others(processes, on)
    if is_first_worker():
        folder.check_free(resume=resume, overwrite=overwrite)
    if not is_worker() and run_as_workers(processes, on, grace):
        return
    _train(loaded, folder, resume=resume, overwrite=overwrite, allow_change=allow_change or [], grace=grace)


def _train(loaded, folder, *, resume: bool, overwrite: bool, allow_change: list[str], grace: float) -> None:
    from contextlib import nullcontext

    from lora_cli.cli.console import note
    from lora_cli.cli.launch import shortage_before
    from lora_cli.cli.tokenizing import tokenizing
    from lora_cli.cli.worker import is_first_worker, leave_hanging
    from lora_cli.runs.train import execute, prepare
    from lora_cli.signals import noted
    from lora_cli.train.parallel import leave_group, quiet_unless_first

    quiet_unless_first()
    if is_first_worker():
        for field in allow_change:
            note(f"--allow-change {field}: where it has changed, the result may be another one", style="yellow")
    # Nobody else can write there before anything is read, and nothing is touched until what can fail early has not
    with folder.held(resume=resume, overwrite=overwrite) if is_first_worker() else nullcontext() as hold:
        with tokenizing() as progress:
            run = prepare(loaded, folder, progress, resume=resume)
        with noted(grace) as signals:
            if hold and (aside := hold.begin()):
                note(f"the old run was moved to {aside}")
            events = execute(
                run,
                resume=resume,
                allow_change=allow_change,
                asked_to_stop=lambda: signals.received is not None,
                give_up=leave_hanging,
                shortage=shortage_before(),
            )
            saved = _follow(run, events, first=hold is not None)
            leave_group()
    if saved is not None:
        _leave(saved, signals.received, first=hold is not None)


def _follow(run, events, *, first: bool) -> int | None:
    """Show what happens and save what comes of it; the step that is saved where the run was interrupted, else None."""
    from contextlib import nullcontext

    from lora_cli.cli.progress import Display
    from lora_cli.runs.train import finish
    from lora_cli.train.events import Finished, Interrupted

    last = None
    with Display(run) if first else nullcontext() as display:
        for last in events:
            if display:
                display.show(last)
    if isinstance(last, Finished):
        adapter = finish(run, last)
        if display:
            display.show_result(adapter)
    return last.saved if isinstance(last, Interrupted) else None


def _leave(saved: int, signal: int | None, *, first: bool) -> None:
    """The last line is the command that continues the run."""
    from signal import SIGTERM, Signals

    from lora_cli.cli.console import note
    from lora_cli.runs.lock import command_to_resume
    from lora_cli.signals import exit_code

    number = signal or SIGTERM  # it went to another process of the run
    if first:
        state = f"step {saved} is saved" if saved else "no step was done yet"
        note(f"interrupted by {Signals(number).name}; {state}; continue with")
        note(command_to_resume())
    raise SystemExit(exit_code(number))
