"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file.", show_default=False)]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe's key, such as lora.r=16; may be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
AdapterOption = Annotated[
    Path, typer.Option("--adapter", metavar="DIR", help="Folder of the adapter.", show_default=False)
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base", metavar="MODEL", help="Base model: folder, hub id or GGUF file; default: what the adapter names."
    ),
]
