"""`lora train`: read the recipe, train, and show what happens."""

from pathlib import Path
from typing import Annotated

import typer

from lora_cli.cli.options import RecipeArgument, SetOption
from lora_cli.errors import Problem, RecipeError


def train(
    recipe: RecipeArgument,
    set_: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="Run folder, instead of the recipe's `output`.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in the folder from its newest checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Move an old run in the folder aside and start anew.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the resolved recipe, the budget and the planned steps; train nothing."),
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine; default: every visible GPU, else 1.")
    ] = None,
    on: Annotated[
        str | None, typer.Option(metavar="PROFILE", help="Where to run: a name from configs/launch/, or a file.")
    ] = None,
) -> None:
    """Train an adapter: `lora train configs/llama7b-qv.yaml --set lora.r=16`."""
    from lora_cli.recipe.reader import read_recipe, with_output

    if resume and overwrite:
        fix = "leave one out: the first continues the old run, the second moves it aside"
        raise RecipeError(Problem("`--resume` and `--overwrite` contradict each other", fix=fix))
    loaded = read_recipe(recipe, set_ or [])
    if out:
        loaded = with_output(loaded, str(out))
    if dry_run:
        from lora_cli.cli.dry_run import show_dry_run

        show_dry_run(loaded)
        return
    from lora_cli.runs.folder import RunFolder

    folder = RunFolder(Path(loaded.recipe.output))
    from lora_cli.cli.launch import is_first_worker, is_worker, run_as_workers
    from lora_cli.cli.slurm import join_srun

    if processes is None and on is None:  # else each task of srun starts workers of its own
        join_srun()
    if is_first_worker():
        folder.check_free(resume=resume, overwrite=overwrite)
    if not is_worker() and run_as_workers(processes, on):
        return
    _train(loaded, folder, resume=resume, overwrite=overwrite)


def _train(loaded, folder, *, resume: bool, overwrite: bool) -> None:
    from contextlib import nullcontext

    from lora_cli.cli.console import note
    from lora_cli.cli.launch import is_first_worker
    from lora_cli.cli.progress import Display
    from lora_cli.runs.train import execute, finish, prepare
    from lora_cli.train.parallel import leave_group, quiet_unless_first

    quiet_unless_first()
    first = is_first_worker()
    run = prepare(loaded, folder)  # before the folder is touched: a run that can't start leaves an old one alone
    if first and (aside := folder.prepare(overwrite=overwrite)):
        note(f"the old run was moved to {aside}")
    if first and resume and not any(folder.checkpoints.iterdir()):
        note(f"nothing to continue in {folder.path}: no checkpoint was saved yet, so the run starts at its first step")
    with folder.locked() if first else nullcontext():
        with Display(run, loaded.recipe.training.log_steps) if first else nullcontext() as display:
            for event in execute(run, resume=resume):
                if display:
                    display.show(event)
        if first:
            adapter = finish(run)
            display.show_result(adapter)
    leave_group()
