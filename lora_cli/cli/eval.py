"""`lora eval`: loss and perplexity of base and adapters on the same rows."""

import math
from pathlib import Path
from typing import Annotated

import typer

from lora_cli.cli.options import BaseOption, JsonOption, MismatchOption, SetOption, TrustOption


def eval_(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RECIPE]", help="A recipe: its base, held-out rows and run folder.", show_default=False
        ),
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Folder of an adapter, may be repeated; default: the recipe's run folder."),
    ] = None,
    base: BaseOption = None,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Rows to measure on, instead of the recipe's held-out rows.")
    ] = None,
    set_: SetOption = None,
    json: JsonOption = False,
    allow_base_mismatch: MismatchOption = False,
    trust_remote_code: TrustOption = None,
) -> None:
    """Measure base and adapter side by side.

    Example: lora eval recipe.yaml, or lora eval --adapter out/ --data rows.jsonl
    """
    from lora_cli.cli.console import inert, note, show_json
    from lora_cli.errors import Problem, RecipeError

    if recipe is None and data is None:
        raise RecipeError(
            Problem("nothing to measure on", fix="give a recipe with `data.eval`, or rows with `--data FILE`")
        )
    if recipe is None and not adapter and base is None:
        raise RecipeError(Problem("nothing to measure", fix="give `--adapter DIR`, a recipe, or `--base MODEL` alone"))
    comparison, name = _compare(recipe, adapter, base, data, set_ or [], allow_base_mismatch)
    note(f"data: {inert(comparison.report.summary())}")
    if json:
        show_json(_as_json(comparison, name))
    else:
        _show(comparison)


def _compare(recipe, adapter, base, data, overrides, allow):
    from lora_cli.cli.tokenizing import tokenizing
    from lora_cli.recipe.reader import read_recipe
    from lora_cli.recipe.schema import Model
    from lora_cli.runs.evaluate import check_task, compare, compare_with_base, load_resident, rows_of_recipe
    from lora_cli.runs.rows import rows_of_file

    found = read_recipe(recipe, overrides) if recipe else None
    model = found.recipe.model if found else Model(base=base) if base else None
    if found and base:
        model = model.model_copy(update={"base": base, "revision": None})
    tuned = Path(found.recipe.output) if found and found.recipe.training.full and not adapter else None
    if found and not adapter and not tuned:
        adapter = [Path(found.recipe.output)]
    loaded = load_resident(adapter or [], model, allow_base_mismatch=allow)
    if found:
        check_task(loaded, found, adapter)
    with tokenizing() as progress:
        rows = (
            rows_of_file(data, loaded.tokenizer, found.recipe.data if found else None, loaded.labels or None, progress)
            if data
            else rows_of_recipe(found, loaded, progress)
        )
    found = compare_with_base(loaded, tuned, model, *rows) if tuned else compare(loaded, *rows)
    return found, loaded.base.name


def _show(comparison) -> None:
    if comparison.majority:
        _show_classes(comparison)
        return
    from lora_cli.cli.console import inert, number, plain_table, show, show_table

    table = plain_table("", "loss", "perplexity")
    measured = {_title(name): found for name, found in comparison.measured.items()}
    for name, found in measured.items():
        table.add_row(name, f"{found.loss:.4f}", f"{found.perplexity:.2f}", style="" if name == "base" else "bold")
    for source in comparison.base.sources:
        table.add_row(inert(source))
        for who, found in measured.items():
            loss = found.sources[source]
            table.add_row(f"  {who}", f"{loss:.4f}", f"{math.exp(min(loss, 700)):.2f}")
    show_table(table)
    show(f"{number(comparison.base.rows)} rows, {number(comparison.base.tokens)} trained tokens, nats a token")


def _show_classes(comparison) -> None:
    from lora_cli.cli.console import inert, number, plain_table, show, show_table

    table = plain_table("", "loss", "accuracy", "macro-F1")
    majority = comparison.majority
    table.add_row(f"always {inert(majority.label)}", "–", *map(_figure, majority.metrics.values()))
    measured = comparison.measured
    for name, found in measured.items():
        table.add_row(_title(name), f"{found.loss:.4f}", *map(_figure, found.metrics.values()), style="bold")
    show_table(table)
    show(f"{number(_rows(measured))} rows, {len(comparison.report.labels)} labels; the most common one is the baseline")


def _title(name: str) -> str:
    from lora_cli.cli.console import inert

    return {"base": "base", "tuned": "fine-tuned"}.get(name) or inert(f"base + {name}")


def _figure(value: float) -> str:
    return f"{value:.4f}"


def _as_json(comparison, name: str) -> dict:
    measured = comparison.measured
    document = {"model": name, "rows": _rows(measured)}
    if majority := comparison.majority:
        document |= {"labels": comparison.report.labels, "majority": {"label": majority.label, **majority.metrics}}
    else:
        document |= {"tokens": comparison.base.tokens}
    if comparison.base:
        document |= {"base": _figures(comparison.base)}
    if comparison.tuned:
        document |= {"tuned": _figures(comparison.tuned)}
    adapters = {key: _figures(found) for key, found in comparison.adapters.items()}
    return document | ({"adapters": adapters} if len(adapters) > 1 else adapters)


def _rows(measured: dict) -> int:
    return next(iter(measured.values())).rows


def _figures(found) -> dict:
    beside = dict(found.metrics) or {"perplexity": found.perplexity}
    return {"loss": found.loss} | beside | ({"sources": dict(found.sources)} if found.sources else {})
