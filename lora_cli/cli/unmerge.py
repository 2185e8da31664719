"""`lora unmerge`: a merged model minus its adapter, on disk."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_cli.cli.merge import weights_bar
from lora_cli.cli.options import AdapterOption, DtypeOption, JsonOption, TrustOption

if TYPE_CHECKING:
    from lora_cli.export.unmerge import UnmergeReport


def unmerge(
    merged: Annotated[Path, typer.Option(metavar="DIR", help="The merged model.")],
    adapter: AdapterOption,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write the base.")],
    base: Annotated[
        str | None, typer.Option(metavar="NAME", help="The true base, to measure the difference to it.")
    ] = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = None,
) -> None:
    """Take an adapter off a merged model, and say how near that comes.

    Example: lora unmerge --merged out/merged --adapter out/ --out base/
    """
    from lora_cli.cli.console import show_json
    from lora_cli.errors import ModelError, Problem
    from lora_cli.export.unmerge import unmerge as take_off
    from lora_cli.lora.completion import load_for
    from lora_cli.models.base import resolve_base
    from lora_cli.models.load import DTYPES

    if not merged.is_dir():
        raise ModelError(
            Problem(
                "there is no such folder", where=str(merged), fix="give the folder of the merged model with `--merged`"
            )
        )
    found = load_for(adapter)
    folder = resolve_base(str(merged)).folder
    true_base = resolve_base(base).folder if base else None
    with weights_bar("unmerging") as progress:
        report = take_off(folder, found, out, dtype=DTYPES[dtype] if dtype else None, base=true_base, progress=progress)
    if as_json:
        show_json(report.as_dict())
    else:
        _show(report, merged, adapter)


def _show(report: "UnmergeReport", merged: Path, adapter: Path) -> None:
    from lora_cli.cli.console import bytes_text, inert, show

    show(f"unmerged {inert(str(adapter))} from {inert(str(merged))}", style="bold")
    show(f"         {report.tensors} weights changed back · {bytes_text(report.bytes)}")
    if not report.recorded:
        show("         the folder has no merge.json that names this adapter: whether it was merged is not known")
    show(f"exactly  no weight can be further than {report.possible:.2g} from the base: the merge had rounded it")
    if report.largest is not None:
        show(
            f"         measured against the base: {report.largest:.2g} at most, {report.mean:.2g} on average, "
            f"{report.equal_share:.1%} of the changed weights equal"
        )
    else:
        show("         `--base` measures how far it is")
    show(f"written  {inert(str(report.out))}")
