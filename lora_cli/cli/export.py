"""`lora export`: an adapter in the form that another program reads."""

from typing import TYPE_CHECKING, Annotated

import typer

from lora_cli.cli.merge import grid_lines, mismatch_lines, proof_lines, read_order, show_merge, weights_bar
from lora_cli.cli.options import (
    AdapterOption,
    BaseGridOption,
    BaseOption,
    ExportDtypeOption,
    JsonOption,
    MismatchOption,
    OutOption,
    ProofRowsOption,
    TrustOption,
)

if TYPE_CHECKING:
    from lora_cli.export.order import ExportReport


def export(
    adapter: AdapterOption,
    to: Annotated[str, typer.Option(metavar="FORMAT", help="peft, merged, gguf-adapter.")],
    base: BaseOption = None,
    out: OutOption = None,
    dtype: ExportDtypeOption = None,
    data: ProofRowsOption = None,
    base_grid: BaseGridOption = "auto",
    allow_base_mismatch: MismatchOption = False,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = None,
) -> None:
    """Write an adapter in another form, and prove that it acts alike.

    Example: lora export --adapter out/ --to gguf-adapter --out adapter.gguf
    """
    from lora_cli.cli.console import show_json
    from lora_cli.errors import Problem, RecipeError
    from lora_cli.export.order import ExportReport
    from lora_cli.export.table import FORMATS
    from lora_cli.runs.folder import RunFolder
    from lora_cli.runs.report import tell_merge

    if to not in FORMATS:
        raise RecipeError(Problem(f"`--to` knows no format {to!r}", fix=f"take one of {', '.join(FORMATS)}"))
    order = read_order(
        adapter,
        to,
        base=base,
        out=out,
        dtype=dtype,
        data=data,
        base_grid=base_grid,
        allow_base_mismatch=allow_base_mismatch,
    )
    with weights_bar("exporting", then="proving") as progress:
        report = FORMATS[to].write(order, progress)
    if not isinstance(report, ExportReport):
        tell_merge(RunFolder(adapter), report.as_dict())
    if as_json:
        show_json(report.as_dict())
    elif isinstance(report, ExportReport):
        _show_adapter(report)
    else:
        show_merge(report, adapter)


def _show_adapter(report: "ExportReport") -> None:
    """What was written, what had to change for its reader, the proof, and how it is used."""
    from lora_cli.cli.console import bytes_text, inert, show

    show(f"exported {report.tensors} tensors · {bytes_text(report.bytes)} · {_read_back(report)}", style="bold")
    for line in [*mismatch_lines(report.base_differences), *_reader_lines(report), *grid_lines(report.grid)]:
        show(line)
    other = "the file" if report.difference is None else "base + what was written"
    for line in proof_lines(report.proof, other) if report.proof else ():
        show(line)
    show(f"written  {inert(str(report.out))}")
    if report.use:
        show(f"use      {inert(report.use)}")


def _read_back(report: "ExportReport") -> str:
    if report.difference is None:
        return report.stored
    if not report.difference:
        return "read back and equal, bit for bit"
    return f"read back: every update within {report.difference:.1g} of its norm"


def _reader_lines(report: "ExportReport") -> list[str]:
    from lora_cli.export.runtimes import TRAITS

    titles = {"converted": "changed", "flag": "note"}
    return [
        f"{titles[finding.verdict.outcome]:<8} {TRAITS[finding.trait].shown}: "
        f"{'; '.join(filter(None, (finding.verdict.why, finding.verdict.fix)))}"
        for finding in report.findings
    ]
