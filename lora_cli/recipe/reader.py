"""A recipe file and its overrides -> a Recipe, or every problem in it at once, each with its place and its fix.

read_recipe("recipes/sft.yaml", ["lora.r=16"]).recipe.lora.r == 16
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lora_cli.errors import Problem, RecipeError, SafetyError
from lora_cli.recipe.document import MOST_BYTES, Document, Finding, Source, override, parse, visible
from lora_cli.recipe.messages import findings_of
from lora_cli.recipe.rules import RULES
from lora_cli.recipe.schema import Block, Recipe, blocks, keys, share_of


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe with the place of each value: `origins` has `default`, `recipe.yaml:7:6` or `--set` by dotted key."""

    recipe: Recipe
    origins: dict[str, str]
    path: Path


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """The recipe at `path`; `overrides` are `block.key=value`, as `--set` takes them.

    Raises RecipeError with all problems, and SafetyError for YAML that a recipe never needs.
    """
    document = _document(Source(str(path), _text(Path(path))))
    for text in overrides:
        override(document, text)
    _empty_blocks(document.values)
    recipe = _check(document)
    if document.findings:
        raise RecipeError(*(f.problem for f in sorted(document.findings, key=lambda f: f.place.order)))
    return LoadedRecipe(recipe, {key: _origin(key, document) for key in keys()}, Path(path))


def with_output(loaded: LoadedRecipe, output: str) -> LoadedRecipe:
    """The recipe with another run folder, given by `--out`."""
    recipe = loaded.recipe.model_copy(update={"output": output})
    return replace(loaded, recipe=recipe, origins=loaded.origins | {"output": "--out"})


def data_source(source: str, folder: Path) -> str:
    """A source of `data` as seen from anywhere: files are relative to the recipe's folder; hub ids and shares stay."""
    if share_of(source) is not None or not os.path.exists(folder / source):
        return source
    return str((folder / source).resolve())


def resolved_yaml(loaded: LoadedRecipe) -> str:
    """The whole recipe as YAML, each value with its origin; it reads as the same recipe from any folder."""
    lines = ["# this run's recipe, resolved: each value and where it came from", ""]
    block = ""
    for key in keys():
        holder, _, name = key.rpartition(".")
        if holder != block:
            block = holder
            lines += [f"{block}:"] if block else []
        text = f"{'  ' if block else ''}{name}: {_flow(_portable(key, loaded))}"
        lines.append(f"{text:<44}  # {loaded.origins[key]}")
    return "\n".join(lines) + "\n"


def value_of(recipe: Recipe, key: str) -> Any:
    """The value of a dotted key."""
    block, _, name = key.rpartition(".")
    return getattr(getattr(recipe, block), name) if block else getattr(recipe, name)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise RecipeError(_unreadable(path, error)) from None
    if len(content) > MOST_BYTES:
        what = f"a recipe has at most {MOST_BYTES // 1_000_000} MB, and this file has more"
        raise SafetyError(Problem(what, str(path), fix="name the recipe, and keep rows in data files"))
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = Source(str(path), content.decode("utf-8-sig", "replace")).at_index(len(content[: error.start].decode()))
        finding = place.problem("the recipe is not UTF-8 text", "save it as UTF-8", quoted=False)
        raise RecipeError(finding.problem) from None


def _unreadable(path: Path, error: OSError) -> Problem:
    where = visible(str(path))
    is_folder = isinstance(error, IsADirectoryError)
    folder = path if is_folder else path.parent
    recipes = ", ".join(f"`{visible(str(near))}`" for near in sorted(folder.glob("*.y*ml"))[:5])
    if is_folder:
        fix = f"name one of the recipes in it: {recipes}" if recipes else "name a recipe file"
        return Problem("the recipe is a folder", where, fix=fix)
    if not isinstance(error, FileNotFoundError):
        return Problem(f"the recipe cannot be read: {error.strerror}", where, fix="make it readable for you")
    fix = f"recipes there: {recipes}" if recipes else f"no recipe is in `{visible(str(folder))}`; name the path of one"
    return Problem("there is no such recipe", where, fix=fix)


def _document(source: Source) -> Document:
    found, document = parse(source)
    if isinstance(found, dict):
        return replace(document, values=found)
    fix = "start it with `model:` and `data:`; docs/recipe.md lists every key"
    if found is None:
        raise RecipeError(Problem("the recipe is empty", source.name, fix=fix))
    what = f"a recipe is blocks of keys, and this is {'a list' if isinstance(found, list) else 'text'}"
    raise RecipeError(document.places[()].problem(what, fix).problem)


def _empty_blocks(values: dict[str, Any]) -> None:
    """A block with all its keys commented out is a block of defaults."""
    values.update({name: {} for name in blocks() if name in values and values[name] is None})


def _check(document: Document) -> Recipe:
    """The recipe as far as it goes: what has no usable value stands at its default, and is among the findings."""
    broken: set[str] = set()
    try:
        recipe = Recipe.model_validate(document.values)
    except ValidationError as error:
        findings, broken = findings_of(error, document)
        document.findings.extend(findings)
        recipe = Recipe.model_validate(_mended(document.values, broken))
    document.findings.extend(_rule_findings(recipe, document, broken))
    return recipe


def _mended(values: dict[str, Any], broken: set[str]) -> dict[str, Any]:
    """The values that can be used, with an example wherever a needed one is missing."""
    mended: dict[str, Any] = {name: {} for name in blocks()}
    for key, field in keys().items():
        block, _, name = key.rpartition(".")
        given, held = (values.get(block), mended[block]) if block else (values, mended)
        if key not in broken and isinstance(given, dict) and name in given:
            held[name] = given[name]
        elif field.is_required():
            held[name] = field.examples[0]
    return mended


def _rule_findings(recipe: Recipe, document: Document, broken: set[str]) -> list[Finding]:
    findings = []
    for rule in RULES:
        problem = None if broken & set(rule.keys) else rule.check(recipe)
        if problem:
            place = document.keys.get(tuple(rule.keys[0].split(".")), document.source.at())
            findings.append(place.problem(problem.what, problem.fix))
    return findings


def _origin(key: str, document: Document) -> str:
    place = document.places.get(tuple(key.split(".")))
    return place.origin if place else "default"


def _portable(key: str, loaded: LoadedRecipe) -> Any:
    value = value_of(loaded.recipe, key)
    if isinstance(value, Block):
        return value.model_dump(exclude_defaults=True)
    if key not in ("data.train", "data.eval") or value is None:
        return value
    folder = loaded.path.parent
    return data_source(value, folder) if isinstance(value, str) else [_portable_entry(entry, folder) for entry in value]


def _portable_entry(entry: Any, folder: Path) -> Any:
    if isinstance(entry, str):
        return data_source(entry, folder)
    return entry.model_dump(exclude_defaults=True) | {"source": data_source(entry.source, folder)}


def _flow(value: Any) -> str:
    """YAML of one value on one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_flow(key)}: {_flow(inner)}' for key, inner in value.items())}}}"
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    text = yaml.safe_dump([value], default_flow_style=True, default_style=style, allow_unicode=True, width=float("inf"))
    return text.strip()[1:-1]
