"""`lora params`: the parameter budget of an adapter, from the shape of its base alone."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from lora_cli.budget.bases import MeasuredBase
    from lora_cli.budget.memory import Method
    from lora_cli.budget.params import Budget
    from lora_cli.recipe.reader import LoadedRecipe
    from lora_cli.recipe.schema import LoRA
    from lora_cli.runs.planned import LabelsToLearn


def params(
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="Take model and adapter from it.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Catalogue name, folder or hub id; else Llama-2-7B.")
    ] = None,
    r: Annotated[int | None, typer.Option("--r", metavar="N", min=1, help="Rank of the update.")] = None,
    targets: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Letters (`qkvo`), `all-linear`, or `q_proj,v_proj`.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(metavar="X", min=0, help="Strength of the update; else 2 × r.")] = None,
    dora: Annotated[bool | None, typer.Option("--dora/--no-dora", help="Count DoRA's magnitudes too.")] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Find the largest r within `5M`, `300K` or `0.1%`.")
    ] = None,
    as_list: Annotated[bool, typer.Option("--list", help="Show the catalogue.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Count what an adapter trains, and what training needs in memory.

    Example: lora params --model Qwen3-8B --r 16 --targets qkvo
    """
    from lora_cli.cli.console import show_json

    if as_list:
        _show_catalogue(as_json)
        return
    given = {"r": r, "alpha": alpha, "targets": targets_of(targets), "use_dora": dora}
    answer = _answer(recipe, model, {key: value for key, value in given.items() if value is not None}, budget)
    if as_json:
        show_json(_document(answer))
    else:
        _show(answer)


@dataclass(frozen=True)
class Answer:
    base: "MeasuredBase"
    lora: "LoRA | None"  # None where every weight is trained
    budget: "Budget"
    methods: "tuple[Method, ...]"
    notes: tuple[str, ...]


def _answer(path: Path | None, model: str | None, given: dict[str, object], limit: str | None) -> Answer:
    """The budget of the adapter that the recipe describes, options before recipe before defaults."""
    from lora_cli.budget.bases import measure_base
    from lora_cli.budget.catalogue import DEFAULT_MODEL
    from lora_cli.budget.memory import compare
    from lora_cli.budget.params import adapted_linears, budget_of, full_budget
    from lora_cli.errors import Problem, RecipeError
    from lora_cli.recipe.reader import read_recipe
    from lora_cli.recipe.schema import LoRA

    found = read_recipe(path) if path else None
    recipe = found.recipe if found else None
    full = recipe is not None and recipe.training.full
    if full and (given or limit):
        fix = "leave the option out, or set `training.method: lora`"
        raise RecipeError(Problem("`training.method: full` trains every weight: there is no adapter to size", fix=fix))
    lora = (recipe.lora if recipe else LoRA()).model_copy(update=given)
    revision = recipe.model.revision if recipe and not model else None
    labels = _labels(found) if found else None
    base = measure_base(
        model or (recipe.model.base if recipe else DEFAULT_MODEL),
        revision,
        labels=labels.names if labels else (),
        modules_to_save=lora.modules_to_save,
        targets=lora.targets,
        bias=lora.bias,
        tokens=lora.tokens_with_rows,
    )
    paths = [module.module for module in base.whole]
    adapted = adapted_linears(base.shape, lora.targets, exclude=lora.exclude, layers=lora.layers, whole=paths)
    if limit:
        lora = lora.model_copy(update={"r": _solve(limit, lora, adapted, base, given)})
    budget = budget_of(adapted, base.shape.parameters, lora.config(), base.whole, biases=base.biases)
    if full:
        return Answer(base, None, full_budget(base.shape.parameters), compare(base.shape, budget), base.shape.notes)
    notes = _notes(base, lora, budget, [linear.path for linear in adapted])
    notes += (labels.note,) if labels and labels.note else ()
    return Answer(base, lora, budget, compare(base.shape, budget), notes)


def _labels(found: "LoadedRecipe") -> "LabelsToLearn | None":
    """What a recipe classifies rows as; None, and no torch, where it classifies nothing."""
    from lora_cli.recipe.schema import labels_of

    if labels_of(found.recipe.training) is None:
        return None
    from lora_cli.runs.planned import labels_to_learn

    return labels_to_learn(found)


def targets_of(text: str | None) -> str | list[str] | None:
    """`qv` and `all-linear` as they stand; `q_proj,v_proj` as a list."""
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    return names if len(names) > 1 else text


def _solve(limit: str, lora: "LoRA", adapted: list, base: "MeasuredBase", given: dict[str, object]) -> int:
    from lora_cli.budget.params import largest_r, parse_limit
    from lora_cli.errors import Problem, RecipeError

    if "r" in given:
        raise RecipeError(Problem("`--budget` finds r, and `--r` sets it", fix="give one of the two"))
    return largest_r(adapted, lora.config(), parse_limit(limit, base.shape.parameters), base.whole)


def _notes(base: "MeasuredBase", lora: "LoRA", budget: "Budget", paths: list[str]) -> tuple[str, ...]:
    from lora_cli.cli.console import bytes_text
    from lora_cli.lora.config import TAKEN_OFF
    from lora_cli.lora.targets import fused_notices

    notes = [*base.shape.notes, *fused_notices(lora.targets, paths)]
    narrow = [row.module for row in budget.rows if row.r > min(row.in_features, row.out_features)]
    if narrow:
        notes.append(f"the rank is above the width of {', '.join(narrow)}: it adds parameters there and nothing else")
    if lora.init in TAKEN_OFF:
        doubled = bytes_text(2 * budget.adapter_bytes)
        notes.append(f"`lora.init: {lora.init}` is saved as a plain adapter of twice the rank: {doubled}")
    if lora.init == "eva":
        notes.append("`lora.init: eva` moves rank between modules once it has seen rows: the sum of ranks stays")
    return tuple(notes)


def _show(answer: Answer) -> None:
    from lora_cli.budget.memory import assumptions
    from lora_cli.cli.console import bytes_text, inert, show, show_table

    budget, lora = answer.budget, answer.lora
    method = f"LoRA on {inert(_wanted(lora))} · {_strength(lora)}" if lora else "full fine-tuning"
    show(f"{inert(answer.base.name)} · {method}\n", style="bold")
    show_table(_modules(budget, _trained_in_each(lora) if lora else ""))
    show(f"\ntrained   {budget}", style="bold")
    show(f"{'adapter' if lora else 'model  '}   {bytes_text(budget.adapter_bytes)} on disk (float32)\n")
    show_table(_memory(answer.methods))
    show("\n" + "\n".join(assumptions(answer.base.shape)), style="dim")
    for note in answer.notes:
        show(f"note: {note}")


def _wanted(lora: "LoRA") -> str:
    return lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)


def _strength(lora: "LoRA") -> str:
    root = "√" if lora.use_rslora else ""
    return f"r {lora.r} · alpha {lora.effective_alpha:g} · scale alpha / {root}r = {lora.config().scale:g}"


def _trained_in_each(lora: "LoRA") -> str:
    return " + ".join([*(["A"] * (not lora.freeze_A)), "B", *(["m"] * lora.use_dora)]) + " each"


def _modules(budget: "Budget", trained: str) -> "Table":
    from lora_cli.cli.console import number, plain_table

    table = plain_table("module", "in → out", "r", "modules", trained, "parameters")
    for row in budget.rows:
        shape = f"{number(row.in_features)} → {number(row.out_features)}"
        counts = (row.r, row.count, row.each, row.parameters)
        table.add_row(row.module, shape, *map(number, counts))
    for module in budget.whole:
        table.add_row(f"{module.module} (whole{', new' * module.new})", "", "", "1", "", number(module.parameters))
    if budget.biases:
        table.add_row("biases", "", "", "", "", number(budget.biases))
    modules = sum(row.count for row in budget.rows) + len(budget.whole)
    return _ruled(table, "sum", "", "", number(modules), "", number(budget.trainable))


def _memory(methods: "tuple[Method, ...]") -> "Table":
    from lora_cli.cli.console import bytes_text, number, plain_table

    table = plain_table("memory to train", *(method.name for method in methods))
    table.add_row("trained parameters", *(number(method.trainable) for method in methods))
    table.add_row("base weights", *(bytes_text(method.base_bytes) for method in methods))
    table.add_row("adapter", *(bytes_text(method.adapter_bytes) if method.adapter_bytes else "–" for method in methods))
    table.add_row("gradients", *(bytes_text(method.gradient_bytes) for method in methods))
    table.add_row("AdamW state", *(bytes_text(method.optimizer_bytes) for method in methods))
    return _ruled(table, "sum", *(bytes_text(method.total_bytes) for method in methods))


def _ruled(table: "Table", *sums: str) -> "Table":
    """The table with a rule below its heading and another above its sums."""
    from rich import box

    table.box, table.show_edge = box.SIMPLE, False
    table.show_footer, table.footer_style = True, "bold"
    for column, text in zip(table.columns, sums, strict=True):
        column.footer = text
    return table


def _document(answer: Answer) -> dict:
    from lora_cli.budget.memory import assumptions

    base, lora, budget = answer.base, answer.lora, answer.budget
    return {
        "model": {
            "name": base.name,
            "source": base.source,
            "model_type": base.shape.model_type,
            "parameters": budget.base,
        },
        "lora": _adapter(lora) if lora else None,
        "modules": [{**asdict(row), "parameters": row.parameters} for row in budget.rows],
        "whole": [asdict(module) for module in budget.whole],
        "biases": budget.biases,
        "trainable": budget.trainable,
        "total": budget.total,
        "share": budget.share,
        "adapter_bytes": budget.adapter_bytes,
        "memory": [{**asdict(method), "total_bytes": method.total_bytes} for method in answer.methods],
        "assumptions": assumptions(base.shape),
        "notes": answer.notes,
    }


def _adapter(lora: "LoRA") -> dict:
    return {
        "r": lora.r,
        "alpha": lora.effective_alpha,
        "scale": lora.config().scale,
        "targets": lora.targets,
        "use_dora": lora.use_dora,
        "freeze_A": lora.freeze_A,
    }


def _show_catalogue(as_json: bool) -> None:
    from lora_cli.budget.catalogue import CATALOGUE
    from lora_cli.budget.shapes import shape_of
    from lora_cli.cli.console import plain_table, show_json, show_table

    rows = [(entry, shape_of(entry.config)) for entry in CATALOGUE]
    if as_json:
        show_json({"models": [{**asdict(entry), "parameters": shape.parameters} for entry, shape in rows]})
        return
    table = plain_table("name", "parameters")
    table.add_column("hub id")
    for entry, shape in rows:
        table.add_row(entry.name, _count(shape.parameters), next(iter(entry.hub_ids), "–"))
    show_table(table)


def _count(n: int) -> str:
    return f"{n / 10**9:.2f}B" if n >= 10**9 else f"{n / 10**6:.0f}M"
