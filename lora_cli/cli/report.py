"""`lora report`: a run's page and its diagnosis, made anew from the run's files."""

from pathlib import Path
from typing import Annotated

import typer

from lora_cli.cli.options import JsonOption


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Write a run's page and model card, and say what stands out.

    Example: lora report out/
    """
    from dataclasses import asdict

    from lora_cli.cli.console import inert, show, show_json
    from lora_cli.errors import ModelError, Problem
    from lora_cli.runs.folder import RunFolder
    from lora_cli.runs.report import write_report

    run = RunFolder(folder)
    if not run.record.is_file():
        fix = "give the folder that `lora train` wrote to"
        raise ModelError(Problem("there is no run: no run.json", where=str(folder), fix=fix))
    found = write_report(run).findings
    if as_json:
        show_json({"report": str(run.report), "findings": [asdict(finding) for finding in found]})
        return
    for finding in found:
        show(f"{finding.level:<8} {inert(finding.line())}")
    show(f"written  {inert(str(run.report))}")
