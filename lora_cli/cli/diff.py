"""`lora diff`: two adapters side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lora_cli.cli.inspect import show_beside
from lora_cli.cli.options import JsonOption

if TYPE_CHECKING:
    from torch import Tensor

    from lora_cli.runs.inspect import Comparison, Pair

SHADES = " ░▒▓█"
MOST_SHOWN = 16
MOST_PANELS = 11
NAMED = 5


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="An adapter folder.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another.", show_default=False)],
    module: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only modules of this name or path, such as q_proj.")
    ] = None,
    side: Annotated[
        Literal["input", "output"],
        typer.Option(help="Whose directions to compare: those that the updates read (as the LoRA paper), or write."),
    ] = "input",
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Write the overlap of their directions as a picture.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show in what two adapters differ: settings, updates, directions.

    Example: lora diff r8/ r64/ --picture overlap.svg
    """
    from dataclasses import replace

    from lora_cli.cli.console import inert, show, show_json
    from lora_cli.errors import ModelError, Problem, RecipeError
    from lora_cli.export.staging import refuse_output
    from lora_cli.runs.inspect import compare_adapters

    if picture is not None and picture.suffix != ".svg":
        raise RecipeError(
            Problem(f"`--picture {picture}` is no .svg file", fix="name it as in `--picture overlap.svg`")
        )
    if picture is not None:
        refuse_output(picture)
    found = compare_adapters(a, b, side)
    if module is not None:
        pairs = tuple(pair for pair in found.pairs if module in (pair.path, pair.kind, pair.path.rsplit(".", 1)[-1]))
        if not pairs:
            names = ", ".join(dict.fromkeys(pair.kind for pair in found.pairs)) or "none"
            raise ModelError(Problem(f"no module {module!r} in both adapters", fix=f"kinds in both: {names}"))
        found = replace(found, pairs=pairs)
    if picture is not None:
        _write_picture(picture, found, a, b, side)
    if as_json:
        show_json(found.as_dict())
        return
    show(f"A {inert(str(a))} · B {inert(str(b))}", style="bold")
    _show_settings(found)
    if found.pairs:
        _show_pairs(found.pairs)
        _show_overlap(found.pairs, side)
    show_beside(found.beside, "‖A − B‖ / ‖A‖")
    if found.dora:
        show("note     a DoRA: what is compared is its low-rank part, without magnitudes")
    if picture is not None:
        show(f"written  {inert(str(picture))}")


def _show_settings(found: "Comparison") -> None:
    from lora_cli.cli.console import inert, plain_table, show, show_table

    if found.same_base is not None:
        differ = ", ".join(found.base_differences[:3]) + (" …" if len(found.base_differences) > 3 else "")
        where = "the same base" if found.same_base else f"DIFFERENT bases: they differ in {inert(differ)}"
        show(f"trained on {where}")
    if found.tokenizer_differences:
        show(f"trained with DIFFERENT tokenizers: they differ in {', '.join(found.tokenizer_differences)}")
    for name, paths in zip("AB", found.only, strict=True):
        if paths:
            rest = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
            show(f"only {name}   {len(paths)} modules: {inert(', '.join(paths[:NAMED]))}{rest}")
    if not found.config:
        show("settings the same")
        return
    show("")
    table = plain_table("setting", "A", "B")
    for key, (first, second) in found.config.items():
        table.add_row(key, inert(str(first)), inert(str(second)))
    show_table(table)


def _show_pairs(pairs: "tuple[Pair, ...]") -> None:
    from lora_cli.cli.console import inert, number, plain_table, show, show_table

    show("")
    table = plain_table("module", "modules", "‖A − B‖ / ‖A‖", "cosine", "φ(1, 1)", "φ(all, all)", "by chance")
    for kind, group in _by_kind(pairs).items():
        corner = [pair.overlap[-1, -1].item() if pair.overlap.numel() else 0.0 for pair in group]
        first = [pair.overlap[0, 0].item() if pair.overlap.numel() else 0.0 for pair in group]
        chance = [pair.by_chance[-1, -1].item() if pair.overlap.numel() else 0.0 for pair in group]
        means = (_mean(values) for values in ([p.relative for p in group], [p.cosine for p in group]))
        figures = [f"{value:.3f}" for value in (*means, _mean(first), _mean(corner), _mean(chance))]
        table.add_row(inert(kind), number(len(group)), *figures)
    show_table(table)


def _show_overlap(pairs: "tuple[Pair, ...]", side: str) -> None:
    from lora_cli.cli.console import show
    from lora_cli.runs.heat_map import thinned
    from lora_cli.runs.inspect import mean_overlap

    panel, (rows, columns) = thinned(mean_overlap([pair.overlap for pair in pairs]), MOST_SHOWN)
    if not panel.numel():
        show("\nφ(i, j): one of them changes nothing, and so has no directions")
        return
    show(f"\nφ(i, j): how much of the smaller of A's first i and B's first j {side} directions lies in the other")
    show("   i \\ j " + "".join(f"{j:>3}" for j in columns))
    for i, row in zip(rows, panel.tolist(), strict=True):
        show(f"{i:>8} " + "".join(" " + 2 * _shade(value) for value in row))
    show(
        "         " + "  ".join(f"{2 * shade} {n / 5:g}–{(n + 1) / 5:g}" for n, shade in enumerate(SHADES)), style="dim"
    )


def _write_picture(file: Path, found: "Comparison", a: Path, b: Path, side: str) -> None:
    from lora_cli.export.staging import staged_file
    from lora_cli.runs.heat_map import svg
    from lora_cli.runs.inspect import mean_overlap

    kinds = _by_kind(found.pairs)
    panels: dict[str, Tensor] = {
        f"all {len(found.pairs)} modules": mean_overlap([pair.overlap for pair in found.pairs]),
        "random directions": mean_overlap([pair.by_chance for pair in found.pairs]),
    }
    if len(kinds) > 1:
        panels |= {
            kind: mean_overlap([pair.overlap for pair in group]) for kind, group in list(kinds.items())[:MOST_PANELS]
        }
    title = f"Overlap φ(i, j) of the {side} directions of A = {a.name} and B = {b.name}"
    with staged_file(file) as draft:
        draft.write_text(svg(panels, title=title, rows="A", columns="B"), encoding="utf-8")


def _by_kind(pairs: "tuple[Pair, ...]") -> "dict[str, list[Pair]]":
    kinds: dict[str, list[Pair]] = {}
    for pair in pairs:
        kinds.setdefault(pair.kind, []).append(pair)
    return kinds


def _shade(value: float) -> str:
    return SHADES[min(len(SHADES) - 1, int(len(SHADES) * value))]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
