"""`lora resize`: an adapter with less rank."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lora_cli.cli.compose import made_document, show_made
from lora_cli.cli.merge import mismatch_lines
from lora_cli.cli.options import AdapterOutOption, JsonOption, MismatchOption, ModulesOption, TrustOption


def resize(
    adapter: Annotated[Path, typer.Argument(metavar="A", help="Adapter folder.", show_default=False)],
    out: AdapterOutOption,
    r: Annotated[int | None, typer.Option("--r", metavar="N", min=1, help="One rank for all modules, at most.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(metavar="X", min=0, max=1, help="A rank for each module that holds 0.9 of its ‖ΔW‖²."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Ranks within `2M` parameters or `8MB`, where they hold most.")
    ] = None,
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="Its base: needed for a DoRA.")] = None,
    allow_base_mismatch: MismatchOption = False,
    modules: ModulesOption = False,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = None,
) -> None:
    """Cut an adapter to the best update of a lower rank.

    Example: lora resize out/ --r 4 --out small/
    """
    from lora_cli.cli.console import inert, show, show_json
    from lora_cli.models.base import resolve_base
    from lora_cli.runs.compose import resize_folder

    choice = _choice(r, energy, budget)
    own = resolve_base(base) if base else None
    made = resize_folder(adapter, out, choice, base=own, allow_base_mismatch=allow_base_mismatch)
    if as_json:
        show_json(made_document(made))
        return
    show(f"resized  {inert(str(adapter))}", style="bold")
    for line in mismatch_lines(made.base_differences):
        show(line)
    show_made(made, each=modules)


def _choice(r: int | None, energy: float | None, budget: str | None) -> Callable:
    from lora_cli.errors import Problem, RecipeError
    from lora_cli.lora.ranks import by_budget, by_energy, by_number

    if sum(choice is not None for choice in (r, energy, budget)) != 1:
        raise RecipeError(
            Problem("no rank to cut to, or more than one", fix="give one of `--r`, `--energy`, `--budget`")
        )
    if r is not None:
        return partial(by_number, r=r)
    if energy is not None:
        return partial(by_energy, share=energy)
    return partial(by_budget, parameters=_parameters(budget))


def _parameters(text: str) -> int:
    """`2M` parameters as they are, `8MB` as float32 numbers of that many bytes."""
    from lora_cli.budget.params import parse_limit
    from lora_cli.lora.ranks import BYTES_EACH

    if text[-1:].upper() == "B" and text[-2:-1].upper() in ("K", "M", "G"):
        return parse_limit(text[:-1], 0) // BYTES_EACH
    return parse_limit(text, 0)
