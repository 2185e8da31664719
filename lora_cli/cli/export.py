"""`lora export`: an adapter in the form that another program reads."""

from typing import Annotated

import typer

from lora_cli.cli.merge import read_order, show_merge, weights_bar
from lora_cli.cli.options import (
    AdapterOption,
    BaseOption,
    DtypeOption,
    JsonOption,
    MismatchOption,
    OutOption,
    ProofRowsOption,
)


def export(
    adapter: AdapterOption,
    to: Annotated[str, typer.Option(metavar="FORMAT", help="peft (the adapter alone) or merged (a whole model).")],
    base: BaseOption = None,
    out: OutOption = None,
    dtype: DtypeOption = None,
    data: ProofRowsOption = None,
    allow_base_mismatch: MismatchOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write an adapter in another form, and check what was written.

    Example: lora export --adapter out/ --to peft --out adapter/
    """
    from lora_cli.cli.console import show_json
    from lora_cli.errors import Problem, RecipeError
    from lora_cli.export.table import EXPORTERS, PeftReport
    from lora_cli.runs.folder import RunFolder
    from lora_cli.runs.report import tell_merge

    if to not in EXPORTERS:
        raise RecipeError(Problem(f"`--to` knows no format {to!r}", fix=f"take one of {', '.join(EXPORTERS)}"))
    order = read_order(adapter, to, base=base, out=out, dtype=dtype, data=data, allow_base_mismatch=allow_base_mismatch)
    with weights_bar("exporting", then="proving") as progress:
        report = EXPORTERS[to](order, progress)
    if not isinstance(report, PeftReport):
        tell_merge(RunFolder(adapter), report.as_dict())
    if as_json:
        show_json(report.as_dict())
    elif isinstance(report, PeftReport):
        _show_peft(report)
    else:
        show_merge(report, adapter)


def _show_peft(report) -> None:
    from lora_cli.cli.console import bytes_text, inert, show

    show(
        f"exported {report.tensors} tensors · {bytes_text(report.bytes)} · read back and equal, bit for bit",
        style="bold",
    )
    show(f"written  {inert(str(report.out))}: PEFT, vLLM and others load it as it is")
