"""`lora extract`: what a full fine-tune did, as an adapter."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lora_cli.cli.compose import made_document, show_made
from lora_cli.cli.options import AdapterOutOption, JsonOption, ModulesOption, TrustOption

if TYPE_CHECKING:
    from lora_cli.export.extract import Extracted, LeftOut
    from lora_cli.lora.adapter import Adapter

SHOWN = 5


def extract(
    base: Annotated[str, typer.Option(metavar="MODEL", help="What the model was tuned from.", show_default=False)],
    tuned: Annotated[str, typer.Option(metavar="MODEL", help="The fully fine-tuned model.", show_default=False)],
    out: AdapterOutOption,
    r: Annotated[int | None, typer.Option("--r", metavar="N", min=1, help="One rank for all modules.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(metavar="X", min=0, max=1, help="A rank for each module that holds 0.9 of its ‖ΔW‖²."),
    ] = None,
    targets: Annotated[
        str, typer.Option(metavar="NAMES", help="Letters (`qkvo`), `all-linear`, or `q_proj,lm_head`.")
    ] = "all-linear",
    modules_to_save: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Modules to hold whole, such as `norm` or `norm,lm_head`.")
    ] = None,
    bias: Annotated[
        Literal["none", "all", "lora_only"], typer.Option(help="Biases to hold: all, or those of adapted modules.")
    ] = "none",
    modules: ModulesOption = False,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = None,
) -> None:
    """Write a full fine-tune minus its base as an adapter.

    Example: lora extract --base base/ --tuned tuned/ --r 16 --out adapter/
    """
    from lora_cli.cli.console import show_json, working
    from lora_cli.cli.params import targets_of
    from lora_cli.errors import Problem, RecipeError
    from lora_cli.export.extract import extract as take_out
    from lora_cli.export.extract_beside import Kept
    from lora_cli.models.base import resolve_base

    if (r is None) == (energy is None):
        raise RecipeError(Problem("no rank for the adapter, or two", fix="give one of `--r` and `--energy`"))
    with working("extracting") as progress:
        found = take_out(
            resolve_base(base),
            resolve_base(tuned),
            out,
            r=r,
            energy=energy,
            targets=targets_of(targets),
            kept=Kept(_names(modules_to_save), bias),
            progress=progress,
        )
    if as_json:
        left = [asdict(tensor) for tensor in found.left_out]
        show_json(made_document(found.made) | {"left_out": left, "unchanged": found.unchanged})
    else:
        _show(found, base, tuned, each=modules)


def _show(found: "Extracted", base: str, tuned: str, *, each: bool) -> None:
    from lora_cli.cli.console import inert, show

    show(f"extracted {inert(tuned)} − {inert(base)}", style="bold")
    if found.unchanged:
        show(f"         {found.unchanged} of the chosen weights are the same in both")
    show_made(found.made, each=each)
    for line in _beside_lines(found.made.adapter):
        show(line)
    if not found.left_out:
        show("left out nothing: no other tensor has changed")
        return
    listed = [f"{inert(tensor.name)} {_relative(tensor)}" for tensor in found.left_out[:SHOWN]]
    rest = f" and {len(found.left_out) - SHOWN} more" if len(found.left_out) > SHOWN else ""
    show(f"left out {len(found.left_out)} tensors that changed and that this adapter does not hold")
    show(f"         (‖Δ‖ / ‖W‖): {', '.join(listed)}{rest}")
    show("         `--targets` adapts more, `--modules-to-save NAMES` holds modules whole, `--bias all` biases")


def _beside_lines(adapter: "Adapter") -> list[str]:
    """What is held as it is, beside the low-rank updates."""
    from lora_cli.cli.console import inert, number

    tokens = adapter.config.trainable_tokens
    parts = [
        f"{', '.join(adapter.whole)} whole" if adapter.whole else "",
        f"{number(len(adapter.biases))} biases" if adapter.biases else "",
        f"the rows of {len(tokens)} tokens that the base has none for" if tokens else "",
    ]
    said = " · ".join(filter(None, parts))
    return [f"beside   {inert(said)}"] if said else []


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _relative(tensor: "LeftOut") -> str:
    if tensor.change is None:
        return "(another shape)"
    return "(was zero)" if tensor.relative is None else f"{tensor.relative:.2g}"
