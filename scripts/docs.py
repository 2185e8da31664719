"""Writes the pages that are made from the code; with --check, exits 1 naming those that are stale.

A new page is a row of PAGES: its path, and the function that gives its text.
"""

import argparse
import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path

from lora_cli.export.runtimes import RUNTIMES, TRAITS
from lora_cli.recipe.reference import recipe_page, recipe_schema

ROOT = Path(__file__).resolve().parent.parent


def recipe_schema_text() -> str:
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


# The floors of the house, the highest first: what a package may import stands below it.
FLOORS = (
    "cli",
    "runs",
    "evaluate",
    "train",
    "infer",
    "export",
    "budget",
    "models",
    "objectives",
    "data",
    "recipe",
    "lora",
    "kernels",
    ".",
)


def code_page() -> str:
    """docs/code.md: the tree of modules, a line a file, from the file's own first sentence."""
    return f"""# The code, a line a file

Imports point down: the highest floor comes first, and a file imports from the floors below its own. Read
[`lora/layer.py`](../lora_cli/lora/layer.py) (what LoRA is), [`train/loop.py`](../lora_cli/train/loop.py) (what training is) and
[`runs/train.py`](../lora_cli/runs/train.py) (how a recipe becomes both) first.

```
{_tree()}```
"""


def _tree() -> str:
    lines = ["lora_cli/"]
    for floor in FLOORS:
        lines += [f"  {floor}/"] if floor != "." else []
        for path in sorted((ROOT / "lora_cli" / floor).glob("*.py")):
            if not path.name.startswith("__"):
                indent = "    " if floor != "." else "  "
                lines.append(f"{indent + path.name:<24}{_first_sentence(path)}")
    return "\n".join(lines) + "\n"


def _first_sentence(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".:")


def weights_page() -> str:
    """docs/weights.md, from the table that the tests go through."""
    sys.path.insert(0, str(ROOT / "tests"))
    from method_by_weight import page

    return page()


def export_page() -> str:
    """docs/export.md with its table of runtimes made anew."""
    text = _current(ROOT / "docs/export.md")
    before, rest = text.split("<!-- runtimes -->")
    after = rest.split("<!-- /runtimes -->")[1]
    return f"{before}<!-- runtimes -->\n{_runtimes()}<!-- /runtimes -->{after}"


def _runtimes() -> str:
    lines = ["| runtime | an adapter with | is | why |", "| --- | --- | --- | --- |"]
    for runtime in RUNTIMES.values():
        for trait, verdict in runtime.verdicts.items():
            said = f"{verdict.outcome}: {verdict.fix}" if verdict.fix else verdict.outcome
            lines.append(f"| {runtime.name} | {TRAITS[trait].shown} | {said} | {verdict.why} |")
    return "\n".join(lines) + "\n"


PAGES: tuple[tuple[str, Callable[[], str]], ...] = (
    ("docs/recipe.md", recipe_page),
    ("docs/recipe.schema.json", recipe_schema_text),
    ("docs/weights.md", weights_page),
    ("docs/export.md", export_page),
    ("docs/code.md", code_page),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is stale")
    check = parser.parse_args().check
    stale = [name for name, page in PAGES if _current(ROOT / name) != page()]
    if check:
        for name in stale:
            print(f"{name} is stale: run `python scripts/docs.py`", file=sys.stderr)
        return 1 if stale else 0
    for name, page in PAGES:
        if name in stale:
            (ROOT / name).write_text(page(), encoding="utf-8")
            print(f"wrote {name}")
    return 0


def _current(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
