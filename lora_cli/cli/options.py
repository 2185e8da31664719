"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Dtype = Literal["float32", "bfloat16", "float16"]

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file.", show_default=False)]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe's key, such as lora.r=16; may be repeated."),
]
AdapterOption = Annotated[Path, typer.Option(metavar="DIR", help="The run folder, or any PEFT adapter.")]
BaseOption = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Folder, hub id or GGUF file; else what the adapter names.")
]
MismatchOption = Annotated[
    bool, typer.Option("--allow-base-mismatch", help="Accept a base that the adapter was not trained on.")
]
OutOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where to write; else inside the adapter's folder.")
]
AdapterOutOption = Annotated[Path, typer.Option(metavar="DIR", help="Where to write the adapter.", show_default=False)]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Of all weights; else each keeps the base's.")]
ExportDtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16", "q8_0"] | None,
    typer.Option("--dtype", help="Of a whole model's weights, q8_0 in GGUF alone; else the base's."),
]
BaseGridOption = Annotated[
    Literal["auto", "original", "nf4"],
    typer.Option(
        help="Of an adapter trained on nf4: merge into the base as stored, as nf4 gave it back, or the nearer."
    ),
]
ProofRowsOption = Annotated[
    str | None, typer.Option("--data", metavar="FILE", help="Rows for the proof, best held out; else those of the run.")
]


def _trust(flags: list[str] | None) -> list[str] | None:
    from lora_cli.models.trust import trust

    trust(flags or [])
    return flags


TrustOption = Annotated[
    list[str] | None,
    typer.Option(
        "--trust-remote-code",
        metavar="REPO@COMMIT",
        help="Run the code that this base brings along, at this full commit.",
        callback=_trust,
        show_default=False,
    ),
]
ModulesOption = Annotated[bool, typer.Option("--modules", help="A line for each module, not for each kind.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
