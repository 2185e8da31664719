"""`lora data`: rows as tokens, as training renders them, the trained ones coloured."""

from collections.abc import Iterator
from itertools import groupby
from typing import Annotated

import typer

from lora_cli.cli.options import JsonOption, RecipeArgument, SetOption, TrustOption

OPEN, CLOSE = "⟦", "⟧"  # around trained tokens, where there is no colour
BORDER = "│"


def data(
    recipe: RecipeArgument,
    set_: SetOption = None,
    row: Annotated[
        str | None, typer.Option(metavar="[SOURCE:]N", help="The row of this number, as messages name it.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(metavar="NAME", help="Rows of this source, as the recipe names it.")
    ] = None,
    held_out: Annotated[bool, typer.Option("--held-out", help="Held-out rows instead of those trained on.")] = False,
    packed: Annotated[bool, typer.Option("--packed", help="The rows of one step as they are packed.")] = False,
    step: Annotated[int, typer.Option(metavar="N", min=1, help="The step that --packed shows.")] = 1,
    tokens: Annotated[bool, typer.Option("--tokens", help=f"Put a {BORDER} between tokens.")] = False,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="Examples, or packed rows, to show at most.")] = 3,
    json: JsonOption = False,
    trust_remote_code: TrustOption = None,
) -> None:
    """Show rows as tokens, exactly as they are trained.

    Example: lora data recipe.yaml --row 17
    """
    from lora_cli.cli.console import show_json
    from lora_cli.cli.tokenizing import tokenizing
    from lora_cli.errors import Problem, RecipeError
    from lora_cli.recipe.reader import read_recipe
    from lora_cli.runs.shown import Asked, chosen, packed_step, prepare_rows

    if packed and (row or source or held_out):
        what = "`--packed` shows the rows of a step, and takes neither `--row` nor `--source` nor `--held-out`"
        raise RecipeError(Problem(what, fix="choose the step with `--step`"))
    with tokenizing() as progress:
        prepared = prepare_rows(read_recipe(recipe, set_ or []), progress)
    if packed:
        rows = packed_step(prepared, step)
        show_json(_packed_json(prepared, rows[:limit], step)) if json else _show_packed(
            prepared, rows, step, limit, tokens
        )
        return
    found = chosen(prepared, Asked(row, source, held_out))
    if json:
        show_json({"examples": [_as_json(prepared, *shown) for shown in found.first(limit)], "found": len(found)})
    else:
        _show(prepared, found, limit, tokens)


def _show(prepared, found, limit: int, borders: bool) -> None:
    from lora_cli.cli.console import note, show

    for example, held_out in found.first(limit):
        _show_example(prepared, example, held_out, borders)
        show("")
    if len(found) > limit:
        note(f"{limit:,} of {len(found):,} examples; `--limit` and `--row` show others", style="dim")


def _show_packed(prepared, rows, step: int, limit: int, borders: bool) -> None:
    from lora_cli.cli.console import note, show

    for number, row in enumerate(rows[:limit], 1):
        count = sum(len(example.input_ids) for example in row)
        documents = f"{len(row)} document{'s' * (len(row) > 1)}"
        show(f"═══ step {step} · row {number} of {len(rows)} · {documents} · {count} tokens", style="bold")
        for example in row:
            _show_example(prepared, example, False, borders)
        show("")
    if len(rows) > limit:
        note(f"{limit:,} of {len(rows):,} rows; `--limit` shows more", style="dim")


def _show_example(prepared, example, held_out: bool, borders: bool) -> None:
    from rich.text import Text

    from lora_cli.cli.console import inert, out, show

    trained = sum(weight > 0 for weight in example.weights)
    side = (f" · {example.side}" if example.side else "") + (" · held out" if held_out else "")
    label = prepared.label(example)
    learned = f"{trained} trained" if label is None else f"label {inert(label)}"
    header = f"{inert(str(example.row))} · {len(example.input_ids)} tokens · {learned} · cut {example.cut}{side}"
    show(f"─── {header}", style="bold")
    coloured = out.color_system is not None and not out.no_color
    line = Text()
    weights = example.weights if label is None else [0.0] * len(example.weights)  # its label is learned, no token
    for weight, texts in _spans(prepared.texts(example), weights):
        text = (BORDER if borders else "").join(_visible(text) for text in texts)
        mark = "" if weight in (0, 1) else f"×{weight:g}"
        if weight and not coloured:
            text = OPEN + text + CLOSE
        line.append(text + mark, style="green" if weight else "dim")
    out.print(line, soft_wrap=True)


def _spans(texts: list[str], weights: list[float]) -> Iterator[tuple[float, list[str]]]:
    """Neighbouring tokens of one weight."""
    for weight, pairs in groupby(zip(weights, texts, strict=True), key=lambda pair: pair[0]):
        yield weight, [text for _, text in pairs]


def _visible(text: str) -> str:
    """Foreign text, inert, its line ends to be seen."""
    from lora_cli.cli.console import inert

    return inert(text).replace("\n", "⏎\n")


def _as_json(prepared, example, held_out: bool) -> dict:
    return {
        "source": example.row.source,
        "row": example.row.number,
        "held_out": held_out,
        "cut": example.cut,
        **({"side": example.side} if example.side else {}),
        **({} if example.label is None else {"label": prepared.label(example)}),
        "input_ids": example.input_ids,
        "texts": prepared.texts(example),
        "weights": example.weights,
    }


def _packed_json(prepared, rows, step: int) -> dict:
    return {
        "step": step,
        "rows": [{"documents": [_as_json(prepared, example, False) for example in row]} for row in rows],
    }
