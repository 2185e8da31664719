"""`lora generate`: the same prompts, answered by the base and by the adapter."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from lora_cli.cli.options import BaseOption, JsonOption, MismatchOption, TrustOption


def generate(
    adapter: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Folder of an adapter, may be repeated; without it, the base alone."),
    ] = None,
    base: BaseOption = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="A prompt; may be repeated. Without it, one a line from stdin. JSON where `data.template` has several fields."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens an answer has at most.")] = 96,
    json: JsonOption = False,
    allow_base_mismatch: MismatchOption = False,
    trust_remote_code: TrustOption = None,
) -> None:
    """Answer prompts by base and adapters side by side, in one load.

    Example: lora generate --adapter out/ --prompt 'What is a kludge?'
    """
    from lora_cli.cli.console import inert, show, show_json
    from lora_cli.errors import Problem, RecipeError
    from lora_cli.recipe.schema import Model

    if not adapter and base is None:
        raise RecipeError(Problem("no model to ask", fix="give `--adapter DIR` or `--base MODEL`"))
    prompts = prompt or [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not prompts:
        raise RecipeError(Problem("no prompt", fix="give `--prompt '…'`, or one prompt a line on stdin"))
    from lora_cli.runs.evaluate import load_resident, side_by_side
    from lora_cli.runs.record import trained_form

    for folder in adapter or []:
        for asked in prompts:
            trained_form(folder).filled(asked)  # a prompt that can't be asked is told before any weight is read
    loaded = load_resident(adapter or [], Model(base=base) if base else None, allow_base_mismatch=allow_base_mismatch)
    answers = side_by_side(loaded, prompts, max_new_tokens)
    if json:
        show_json(answers)
        return
    width = max(8, *(len(name) for name in ("base", *loaded.adapters)))
    for question, found in answers.items():
        show(f"> {inert(question)}", style="bold")
        for who, text in found.items():
            show(f"  {inert(who):<{width}} {inert(text)}")
        show("")
