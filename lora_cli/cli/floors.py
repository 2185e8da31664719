"""The lowest versions of the libraries that read foreign files: below them are known ways to run code from such a file.

torch 2.10 and transformers 5.3 closed the last that are known (CVE-2026-24747, CVE-2026-4372); jinja2 3.1.6 the ways out
of its sandbox. What we build on is a little newer. Asked of the installed packages' metadata: nothing is imported.
"""

import re

from lora_cli.errors import ModelError, Problem

FLOORS = {"torch": "2.11", "transformers": "5.16", "jinja2": "3.1.6", "safetensors": "0.8"}


def check_versions() -> None:
    """Raise ModelError for a library that is missing or too old to be handed a file from elsewhere."""
    problems = [problem for name, floor in FLOORS.items() if (problem := _problem(name, floor))]
    if problems:
        raise ModelError(*problems)


def _problem(name: str, floor: str) -> Problem | None:
    from importlib.metadata import PackageNotFoundError, version

    fix = f"pip install '{name}>={floor}'"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Problem(f"{name} is not installed", fix=fix)
    if _numbers(found) >= _numbers(floor):
        return None
    return Problem(f"{name} {found} is too old to be handed files from elsewhere: {floor} is the least", fix=fix)


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of `2.13.0+cpu`."""
    return tuple(map(int, re.match(r"\d+(\.\d+)*", version)[0].split(".")))
