"""`lora inspect`: what an adapter is, and what each of its modules does."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_cli.cli.compose import span
from lora_cli.cli.options import JsonOption, MismatchOption, ModulesOption, TrustOption

if TYPE_CHECKING:
    from lora_cli.runs.inspect import Beside, Inspection, Module

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 16
NAMED = 5


def inspect(
    adapter: Annotated[Path, typer.Argument(metavar="A", help="Adapter folder.", show_default=False)],
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Its base, for ‖ΔW‖ / ‖W‖ and for intruders.")
    ] = None,
    modules: ModulesOption = False,
    intruders: Annotated[
        bool, typer.Option("--intruders", help="Count directions that the base has nothing like; slow, needs --base.")
    ] = False,
    allow_base_mismatch: MismatchOption = False,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = None,
) -> None:
    """Show what an adapter is, how strong, and how much rank works.

    Example: lora inspect out/ --base Qwen/Qwen3-0.6B
    """
    from lora_cli.cli.console import show_json, working
    from lora_cli.errors import Problem, RecipeError
    from lora_cli.models.base import resolve_base
    from lora_cli.runs.inspect import inspect_adapter

    if intruders and base is None:
        raise RecipeError(Problem("`--intruders` compares with the base", fix="give it with `--base`"))
    with working("inspecting") as progress:
        found = inspect_adapter(
            adapter,
            resolve_base(base) if base else None,
            find_intruders=intruders,
            allow_base_mismatch=allow_base_mismatch,
            progress=progress,
        )
    if as_json:
        show_json(found.as_dict())
        return
    _show_identity(found)
    _show_modules(found.modules, each=modules)
    show_beside(found.beside, "of ‖W‖" if base else None)
    _show_advice(found)


def sparkline(values: Sequence[float]) -> str:
    """Bars against the largest: one a value, or one for several neighbours where there are many."""
    top = max(values, default=0.0)
    if top <= 0:
        return "–"
    step = max(1, -(-len(values) // WIDTH))
    means = [sum(values[n : n + step]) / len(values[n : n + step]) for n in range(0, len(values), step)]
    return "".join(BARS[min(len(BARS) - 1, int(len(BARS) * value / top))] for value in means)


def _show_identity(found: "Inspection") -> None:
    from lora_cli.cli.console import inert, number, show

    adapter, config = found.adapter, found.adapter.config
    kind = "DoRA" if config.use_dora else "LoRA"
    root = "√" if config.use_rslora else ""
    show(f"{inert(str(found.folder))} · {kind} · {number(adapter.parameters)} parameters", style="bold")
    ranks = [module.r for module in found.modules]
    show(
        f"rank     {span(min(ranks), max(ranks))} · alpha {config.lora_alpha:g} · scale alpha / {root}r = {config.scale:g}"
    )
    show(f"adapter  SHA-256 {adapter.digest()[:12]}")
    name = inert(config.base_model_name_or_path or "not named")
    weights = f"fingerprint {adapter.base.short}" if adapter.base else "weights not known"
    tokenizer = "tokenizer known" if adapter.tokenizer else "tokenizer not known"
    show(f"base     {name} · {weights} · {tokenizer}")
    if adapter.origin:
        show(f"made     {inert(_origin(adapter.origin))}")
    show("")


def _origin(origin: dict) -> str:
    parents = origin.get("parents")
    names = [
        f"{p['weight']} × {p.get('name')}" if "weight" in p else str(p.get("name"))
        for p in (parents if isinstance(parents, list) else [])
        if isinstance(p, dict)
    ]
    method = f" ({origin['method']})" if "method" in origin else ""
    return f"by lora {origin.get('command')}{method} from {', '.join(names)}"


def _show_modules(modules: Sequence["Module"], *, each: bool) -> None:
    from lora_cli.cli.console import inert, number, plain_table, show_table

    groups: dict[str, list[Module]] = {}
    for module in modules:
        groups.setdefault(module.path if each else module.kind, []).append(module)
    measured, counted = modules[0].relative is not None, modules[0].intruders is not None
    columns = ["module", "modules", "r", "‖ΔW‖", *(["of ‖W‖"] if measured else []), "effective r", "r for 90 %"]
    table = plain_table(*columns, *(["intruders"] if counted else []))
    table.add_column("spectrum", no_wrap=True)
    for name, group in groups.items():
        row = [inert(name), number(len(group)), _range(m.r for m in group), _range(m.norm for m in group)]
        row += [_range(m.relative for m in group)] if measured else []
        row += [_range(m.effective_rank for m in group), _range(m.energy_rank for m in group)]
        row += [number(sum(m.intruders for m in group))] if counted else []
        table.add_row(*row, sparkline(_mean_spectrum(group)))
    show_table(table)


def show_beside(parts: "Sequence[Beside]", relative: str | None) -> None:
    """What is trained beside the layers; `relative` heads the column of how far it is from what it is compared with."""
    from lora_cli.cli.console import inert, number, plain_table, show, show_table

    if not parts:
        return
    show("")
    table = plain_table("beside", "parameters", *([relative] if relative else []))
    for path, kind, group in _by_kind_beside(parts):
        far = [part.relative for part in group if part.relative is not None]
        title = f"{len(group)} biases" if kind == "bias" else f"rows of {path}" if kind == "rows" else f"{path}, whole"
        cells = [_range(far) if far else "–"] if relative else []
        table.add_row(inert(title), number(sum(part.parameters for part in group)), *cells)
    show_table(table)


def _by_kind_beside(parts: "Sequence[Beside]") -> "list[tuple[str, str, list[Beside]]]":
    """Each by itself, but for biases, which are many and small."""
    alone = [(part.path, part.kind, [part]) for part in parts if part.kind != "bias"]
    biases = [part for part in parts if part.kind == "bias"]
    return alone + ([("", "bias", biases)] if biases else [])


def _mean_spectrum(group: Sequence["Module"]) -> list[float]:
    """Singular values against the largest of their module, averaged."""
    alive = [m.singular_values for m in group if m.singular_values and m.singular_values[0] > 0]
    longest = max(map(len, alive), default=0)
    shares = [[s / values[0] for s in values] + [0.0] * (longest - len(values)) for values in alive]
    return [sum(column) / len(shares) for column in zip(*shares, strict=True)]


def _show_advice(found: "Inspection") -> None:
    from lora_cli.cli.console import inert, show

    show("")
    if found.adapter.config.use_dora:
        show("note     a DoRA: effective rank and spectrum are of its low-rank part")
    dead = [module.path for module in found.modules if module.dead]
    if dead:
        rest = f" and {len(dead) - NAMED} more" if len(dead) > NAMED else ""
        show(f"dead     {len(dead)} modules change nothing: {inert(', '.join(dead[:NAMED]))}{rest}")
    if len(dead) < len(found.modules):
        _show_suggested(found.suggested)


def _show_suggested(keys: dict[str, object] | None) -> None:
    """In a recipe's own words, to be copied."""
    from lora_cli.cli.console import inert, show

    if keys is None:
        show("rank     no kind of module holds 90 % of its ‖ΔW‖² with less rank than it has")
        return
    show("rank     90 % of every ‖ΔW‖² fits in less, at the same scale; in a recipe:")
    show("lora:")
    for key, value in keys.items():
        if isinstance(value, dict):
            value = "{" + ", ".join(f"{inert(kind)}: {number:g}" for kind, number in value.items()) + "}"
        if value != "{}":
            show(f"  {key}: {value if isinstance(value, str) else f'{value:g}'}")


def _range(values) -> str:
    found = list(values)
    low, high = (float(f"{value:.2g}") for value in (min(found), max(found)))
    return span(low, high)
