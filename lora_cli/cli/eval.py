"""`lora eval`: loss and perplexity of base and adapter on the same rows."""

import math
from pathlib import Path
from typing import Annotated

import typer

from lora_cli.cli.options import BaseOption, JsonOption, MismatchOption, SetOption


def eval_(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RECIPE]", help="A recipe: its base, held-out rows and run folder.", show_default=False
        ),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the adapter; default: the recipe's run folder.")
    ] = None,
    base: BaseOption = None,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Rows to measure on, instead of the recipe's held-out rows.")
    ] = None,
    set_: SetOption = None,
    json: JsonOption = False,
    allow_base_mismatch: MismatchOption = False,
) -> None:
    """Measure base and adapter side by side: `lora eval recipe.yaml`, or `lora eval --adapter out/ --data rows.jsonl`."""
    from lora_cli.cli.console import inert, note, show_json
    from lora_cli.errors import Problem, RecipeError

    if recipe is None and data is None:
        raise RecipeError(
            Problem("nothing to measure on", fix="give a recipe with `data.eval`, or rows with `--data FILE`")
        )
    if recipe is None and adapter is None and base is None:
        raise RecipeError(Problem("nothing to measure", fix="give `--adapter DIR`, a recipe, or `--base MODEL` alone"))
    if allow_base_mismatch:
        note("--allow-base-mismatch: the base's fingerprint is not required to match", style="yellow")
    comparison, name = _compare(recipe, adapter, base, data, set_ or [], allow_base_mismatch)
    note(f"data: {inert(comparison.report.summary())}")
    if json:
        show_json(_as_json(comparison, name))
    else:
        _show(comparison)


def _compare(recipe, adapter, base, data, overrides, allow):
    from lora_cli.recipe.reader import read_recipe
    from lora_cli.recipe.schema import Model
    from lora_cli.runs.evaluate import check_task, compare, load_pair, rows_of_recipe
    from lora_cli.runs.rows import rows_of_file

    found = read_recipe(recipe, overrides) if recipe else None
    model = found.recipe.model if found else Model(base=base) if base else None
    if found and base:
        model = model.model_copy(update={"base": base, "revision": None})
    if found and adapter is None:
        adapter = Path(found.recipe.output)
    pair = load_pair(adapter, model, allow_base_mismatch=allow)
    if found:
        check_task(pair, found, adapter)
    rows = (
        rows_of_file(data, pair.tokenizer, found.recipe.data if found else None, pair.labels or None)
        if data
        else rows_of_recipe(found, pair)
    )
    return compare(pair, *rows), pair.base.name


def _show(comparison) -> None:
    if comparison.majority:
        _show_classes(comparison)
        return
    from lora_cli.cli.console import inert, number, out, plain_table, show

    table = plain_table("", "loss", "perplexity")
    table.add_row("base", f"{comparison.base.loss:.4f}", f"{comparison.base.perplexity:.2f}")
    if comparison.adapter:
        table.add_row(
            "base + adapter", f"{comparison.adapter.loss:.4f}", f"{comparison.adapter.perplexity:.2f}", style="bold"
        )
    for source in comparison.base.sources:
        table.add_row(inert(source))
        for who, found in {"base": comparison.base, "base + adapter": comparison.adapter}.items():
            if found:
                table.add_row(
                    f"  {who}", f"{found.sources[source]:.4f}", f"{math.exp(min(found.sources[source], 700)):.2f}"
                )
    out.print(table)
    show(f"{number(comparison.base.rows)} rows, {number(comparison.base.tokens)} trained tokens, nats a token")


def _show_classes(comparison) -> None:
    from lora_cli.cli.console import inert, number, out, plain_table, show

    table = plain_table("", "loss", "accuracy", "macro-F1")
    majority = comparison.majority
    table.add_row(f"always {inert(majority.label)}", "–", *map(_figure, majority.metrics.values()))
    for name, found in (("base", comparison.base), ("base + adapter", comparison.adapter)):
        if found:
            table.add_row(name, f"{found.loss:.4f}", *map(_figure, found.metrics.values()), style="bold")
    out.print(table)
    rows = (comparison.adapter or comparison.base).rows
    show(f"{number(rows)} rows, {len(comparison.report.labels)} labels; the most common one is the baseline")


def _figure(value: float) -> str:
    return f"{value:.4f}"


def _as_json(comparison, name: str) -> dict:
    measured = {"base": comparison.base, "adapter": comparison.adapter}
    found = comparison.base or comparison.adapter
    document = {"model": name, "rows": found.rows}
    if majority := comparison.majority:
        document |= {"labels": comparison.report.labels, "majority": {"label": majority.label, **majority.metrics}}
    else:
        document |= {"tokens": found.tokens}
    return document | {key: _figures(one) for key, one in measured.items() if one}


def _figures(found) -> dict:
    beside = dict(found.metrics) or {"perplexity": found.perplexity}
    return {"loss": found.loss} | beside | ({"sources": dict(found.sources)} if found.sources else {})
