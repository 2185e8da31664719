"""Lines and code lines of every file and package; with --since REV, the change since a commit.

A code line holds something that Python runs: not blank, not a comment, not part of a docstring.
"""

import argparse
import ast
import io
import subprocess
import tokenize
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("lora_cli", "scripts", "tests")
SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


class Size(NamedTuple):
    lines: int = 0
    code: int = 0

    def plus(self, other: "Size") -> "Size":
        return Size(self.lines + other.lines, self.code + other.code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--since", metavar="REV", help="show the change since this commit")
    since = parser.parse_args().since
    now = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in _files()}
    before = sources_at(since) if since else {}
    print(table(sizes(now), sizes(before) if since else None))


def _files() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def sources_at(revision: str) -> dict[str, str]:
    """The text of every Python file of a commit, by path."""
    names = _git("ls-tree", "-r", "--name-only", revision, "--", *FOLDERS).splitlines()
    return {name: _git("show", f"{revision}:{name}") for name in names if name.endswith(".py")}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def sizes(sources: Mapping[str, str]) -> dict[str, Size]:
    """Files that hold anything, and the sum of every folder under its own name with a slash."""
    found: dict[str, Size] = {}
    for name, text in sources.items():
        size = measure(text)
        for row in (*(f"{folder}/" for folder in PurePosixPath(name).parents), name):
            found[row] = found.get(row, Size()).plus(size)
    return {name: size for name, size in found.items() if size.lines}


def measure(text: str) -> Size:
    docstrings = _docstring_lines(ast.parse(text))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SILENT:
            code.update(range(token.start[0], token.end[0] + 1))
    return Size(text.count("\n"), len(code - docstrings))


def _docstring_lines(tree: ast.Module) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(
            node
        ):
            lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def table(now: Mapping[str, Size], before: Mapping[str, Size] | None) -> str:
    """A line a file, each after its folder; with `before`, only what changed."""
    rows = [f"{'lines':>7} {'code':>7}" + ("" if before is None else f" {'Δ lines':>8} {'Δ code':>7}")]
    for name in sorted({*now, *(before or {})}, key=_place):
        size = now.get(name, Size())
        row = f"{size.lines:7,} {size.code:7,}"
        if before is not None:
            old = before.get(name, Size())
            if old == size:
                continue
            row += f" {size.lines - old.lines:+8,} {size.code - old.code:+7,}"
        rows.append(f"{row}  {_label(name)}")
    return "\n".join(rows)


def _place(name: str) -> list[str]:
    return [] if name == "./" else name.rstrip("/").split("/")


def _label(name: str) -> str:
    depth = name.rstrip("/").count("/")
    return "total" if name == "./" else "  " * depth + name.rstrip("/").rsplit("/", 1)[-1] + "/" * name.endswith("/")


if __name__ == "__main__":
    main()
