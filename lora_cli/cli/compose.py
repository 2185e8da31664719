"""`lora compose`: several adapters as one."""

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lora_cli.cli.options import AdapterOutOption, JsonOption, MismatchOption, ModulesOption, TrustOption

if TYPE_CHECKING:
    from lora_cli.export.adapter_folder import Made
    from lora_cli.lora.algebra import Fit

Method = Literal["linear", "svd", "ties", "dare", "magnitude"]


def compose(
    adapters: Annotated[list[Path], typer.Argument(metavar="A B …", help="Adapter folders.", show_default=False)],
    out: AdapterOutOption,
    weights: Annotated[
        str | None, typer.Option(metavar="W,W,…", help="How much of each, such as 0.7,0.3; else 1 of each.")
    ] = None,
    method: Annotated[
        Method,
        typer.Option(
            help="linear: the exact sum, of all ranks together. svd: the sum cut to a rank. ties, dare, magnitude: thinned out first, then cut."
        ),
    ] = "linear",
    r: Annotated[int | None, typer.Option("--r", metavar="N", min=1, help="Rank of the result, at most.")] = None,
    density: Annotated[
        float | None,
        typer.Option(
            metavar="X", min=0, max=1, help="Share of the entries that ties (0.2), dare and magnitude (0.5) keep."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of what dare drops.")] = 0,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Their base: for DoRAs, and for heads, biases and rows whose weights don't add up to 1.",
        ),
    ] = None,
    allow_base_mismatch: MismatchOption = False,
    modules: ModulesOption = False,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = None,
) -> None:
    """Add adapters of one base into one, and say how exact it is.

    Example: lora compose chat/ code/ --weights 0.7,0.3 --out both/
    """
    from lora_cli.cli.console import show_json, working
    from lora_cli.errors import Problem, RecipeError
    from lora_cli.lora.algebra import How
    from lora_cli.models.base import resolve_base
    from lora_cli.runs.compose import compose_folders

    if density == 0:
        raise RecipeError(Problem("`--density 0` keeps nothing", fix="give a share above 0"))
    parts = _numbers(weights) if weights else [1.0] * len(adapters)
    with working("composing") as progress:
        made = compose_folders(
            adapters,
            out,
            weights=parts,
            how=How(method, r, density, seed),
            base=resolve_base(base) if base else None,
            allow_base_mismatch=allow_base_mismatch,
            progress=progress,
        )
    if as_json:
        show_json(made_document(made))
        return
    _show(made, list(zip(parts, adapters, strict=True)), method, each=modules)


def made_document(made: "Made") -> dict:
    return {
        "out": str(made.written.out),
        "sha256": made.written.sha256,
        "bytes": made.written.bytes,
        "parameters": made.written.parameters,
        "error": total_error(made.fits.values()),
        "origin": made.adapter.origin,
        "base_differences": list(made.base_differences),
        "modules": {
            path: {"r": len(factors.A), **asdict(made.fits[path])} for path, factors in made.adapter.layers.items()
        },
    }


def show_made(made: "Made", *, each: bool = False) -> None:
    """A table by kind of module, or of each module, the error over all, and where it was written."""
    from lora_cli.cli.console import bytes_text, inert, number, plain_table, show, show_table
    from lora_cli.lora.targets import kind_of

    table = plain_table("module", "modules", "r", "‖ΔW‖", "error", "largest error")
    kinds: dict[str, list[str]] = {}
    for path in made.adapter.layers:
        kinds.setdefault(path if each else kind_of(path), []).append(path)
    for kind, paths in kinds.items():
        ranks = [len(made.adapter.layers[path].A) for path in paths]
        fits = [made.fits[path] for path in paths]
        table.add_row(
            inert(kind),
            number(len(paths)),
            span(min(ranks), max(ranks)),
            f"{_root_sum(fit.norm for fit in fits):.3g}",
            percent(total_error(fits)),
            percent(max(fit.error for fit in fits)),
        )
    show_table(table)
    error = total_error(made.fits.values())
    show(
        "error    none: the result is exact to rounding"
        if error < 1e-6
        else f"error    {percent(error)} of ‖ΔW‖ in all"
    )
    kind = "a DoRA in PEFT's format" if made.adapter.config.use_dora else "a plain PEFT adapter"
    show(f"written  {inert(str(made.written.out))} · {bytes_text(made.written.bytes)} · {kind}, read back equal")


def total_error(fits: "Collection[Fit]") -> float:
    """√Σ(errorᵢ ‖ΔWᵢ‖)² / √Σ‖ΔWᵢ‖²"""
    whole = _root_sum(fit.norm for fit in fits)
    return _root_sum(fit.error * fit.norm for fit in fits) / whole if whole else 0.0


def percent(share: float) -> str:
    return "–" if share < 1e-6 else f"{share:.2%}"


def span(low: float, high: float) -> str:
    """`4`, or `4–16`."""
    return f"{low:g}" if low == high else f"{low:g}–{high:g}"


def _show(made: "Made", parts: list[tuple[float, Path]], method: str, *, each: bool) -> None:
    from lora_cli.cli.console import inert, show

    show(
        f"composed {' + '.join(f'{weight:g} × {inert(str(path))}' for weight, path in parts)} · {method}", style="bold"
    )
    if made.base_differences:
        listed = ", ".join(made.base_differences[:3])
        show(f"         NOT of one base (--allow-base-mismatch): they differ in {inert(listed)}")
    show_made(made, each=each)


def _numbers(text: str) -> list[float]:
    from math import isfinite

    from lora_cli.errors import Problem, RecipeError

    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(map(isfinite, found)):
        raise RecipeError(
            Problem(f"`--weights {text}` is no list of numbers", fix="write them as in `--weights 0.7,0.3`")
        )
    return found


def _root_sum(values) -> float:
    return sum(value**2 for value in values) ** 0.5
