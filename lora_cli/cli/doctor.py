"""`lora doctor`: the machine: versions, devices, what is possible, what is missing and how to get it."""

from typing import Annotated

import typer


def doctor(json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> None:
    """Tell what this machine can do, and how to get what is missing."""
    from lora_cli.cli.console import plain_table, show, show_json, show_table
    from lora_cli.runs.doctor import examine

    findings = examine()
    if json:
        show_json(findings.as_json())
        return
    versions = plain_table("package", "version")
    for name, version in findings.versions.items():
        versions.add_row(name, version or "missing")
    show_table(versions)
    show("")
    abilities = plain_table("ability", "", "")
    abilities.columns[2].justify = abilities.columns[1].justify = "left"
    for ability in findings.abilities:
        abilities.add_row(ability.what, "yes" if ability.possible else "no", ability.note)
    show_table(abilities)
