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
    """Measure base and adapter side by side: `lora eval recipe.yaml`, or `lora eval --adapter out/ --data rows.jsonl`."""
    from lora_cli.cli.console import inert, note, show_json
    from lora_cli.errors import Problem, RecipeError

    if recipe is None and data is None:
        raise RecipeError(
            Problem("nothing to measure on", fix="give a recipe with `data.eval`, or rows with `--data FILE`")
        )
    if recipe is None and not adapter and base is None:
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
    from lora_cli.cli.tokenizing import tokenizing
    from lora_cli.recipe.reader import read_recipe
    from lora_cli.recipe.schema import Model
    from lora_cli.runs.evaluate import check_task, compare, load_resident, rows_of_recipe
    from lora_cli.runs.rows import rows_of_file

    found = read_recipe(recipe, overrides) if recipe else None
    model = found.recipe.model if found else Model(base=base) if base else None
    if found and base:
        model = model.model_copy(update={"base": base, "revision": None})
    if found and not adapter:
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
    return compare(loaded, *rows), loaded.base.name


def _show(comparison) -> None:
    if comparison.majority:
        _show_classes(comparison)
        return
    from lora_cli.cli.console import inert, number, out, plain_table, show

    table = plain_table("", "loss", "perplexity")
    table.add_row("base", f"{comparison.base.loss:.4f}", f"{comparison.base.perplexity:.2f}")
    adapters = {f"base + {name}": found for name, found in comparison.adapters.items()}
    for name, found in adapters.items():
        table.add_row(inert(name), f"{found.loss:.4f}", f"{found.perplexity:.2f}", style="bold")
    for source in comparison.base.sources:
        table.add_row(inert(source))
        for who, found in {"base": comparison.base, **adapters}.items():
            loss = found.sources[source]
            table.add_row(inert(f"  {who}"), f"{loss:.4f}", f"{math.exp(min(loss, 700)):.2f}")
    out.print(table)
    show(f"{number(comparison.base.rows)} rows, {number(comparison.base.tokens)} trained tokens, nats a token")


def _show_classes(comparison) -> None:
    from lora_cli.cli.console import inert, number, out, plain_table, show

    table = plain_table("", "loss", "accuracy", "macro-F1")
    majority = comparison.majority
    table.add_row(f"always {inert(majority.label)}", "–", *map(_figure, majority.metrics.values()))
    measured = _measured(comparison)
    for name, found in measured.items():
        title = name if name == "base" else inert(f"base + {name}")
        table.add_row(title, f"{found.loss:.4f}", *map(_figure, found.metrics.values()), style="bold")
    out.print(table)
    show(f"{number(_rows(measured))} rows, {len(comparison.report.labels)} labels; the most common one is the baseline")


def _figure(value: float) -> str:
    return f"{value:.4f}"


def _as_json(comparison, name: str) -> dict:
    measured = _measured(comparison)
    document = {"model": name, "rows": _rows(measured)}
    if majority := comparison.majority:
        document |= {"labels": comparison.report.labels, "majority": {"label": majority.label, **majority.metrics}}
    else:
        document |= {"tokens": comparison.base.tokens}
    if comparison.base:
        document |= {"base": _figures(comparison.base)}
    adapters = {key: _figures(found) for key, found in comparison.adapters.items()}
    return document | ({"adapters": adapters} if len(adapters) > 1 else adapters)


def _measured(comparison) -> dict:
    """The base, where it can answer, and every adapter."""
    return ({"base": comparison.base} if comparison.base else {}) | dict(comparison.adapters)


def _rows(measured: dict) -> int:
    return next(iter(measured.values())).rows


def _figures(found) -> dict:
    beside = dict(found.metrics) or {"perplexity": found.perplexity}
    return {"loss": found.loss} | beside | ({"sources": dict(found.sources)} if found.sources else {})
