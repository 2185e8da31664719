"""What is wrong with a recipe's values, in sentences: Pydantic's errors -> findings with a place and a fix."""

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lora_cli.recipe.document import Document, Finding, KeyPath, Place, shown
from lora_cli.recipe.schema import blocks, inner_field, inner_of, keys
from lora_cli.recipe.spelling import dotted, fits, near, path_in, spelled, written
from lora_cli.recipe.unknown import unknown_key

# Pydantic's type of an error -> what the value must be
MUST_BE: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "int_parsing": lambda limits: "a whole number",
    "int_parsing_size": lambda limits: "a smaller whole number",
    "int_type": lambda limits: "a whole number",
    "int_from_float": lambda limits: "a whole number",
    "float_parsing": lambda limits: "a number",
    "float_type": lambda limits: "a number",
    "finite_number": lambda limits: "a finite number",
    "bool_parsing": lambda limits: "`true` or `false`",
    "bool_type": lambda limits: "`true` or `false`",
    "string_type": lambda limits: "text",
    "list_type": lambda limits: "a list",
    "dict_type": lambda limits: "a block of `name: value`",
    "model_type": lambda limits: "a block of keys",
    "literal_error": lambda limits: _one_of(_choices(limits)),
    "greater_than": lambda limits: f"above {_number(limits['gt'])}",
    "greater_than_equal": lambda limits: f"at least {_number(limits['ge'])}",
    "less_than": lambda limits: f"below {_number(limits['lt'])}",
    "less_than_equal": lambda limits: f"at most {_number(limits['le'])}",
    "value_error": lambda limits: str(limits["error"]),
}
EMPTY = {"string_too_short", "too_short"}


def findings_of(error: ValidationError, document: Document) -> tuple[list[Finding], set[str]]:
    """The findings, and the dotted names of the keys that have no usable value (so rules about them can't be asked)."""
    errors = error.errors(include_url=False)
    unknown = [unknown_key(e["loc"], document) for e in errors if e["type"] == "extra_forbidden"]
    meant = {key for _, key in unknown if key}
    inside = [e for e in errors if e["type"] in ("extra_forbidden", "missing") and inner_of(e["loc"])]
    missing = [key for e in errors if e["type"] == "missing" and e not in inside for key in _missing(e["loc"])]
    wrong = [e for e in errors if e["type"] not in ("extra_forbidden", "missing")]
    findings = [
        *(finding for finding, _ in unknown),
        *(_needed(key, document) for key in missing if key not in meant),
        *(_needed_inside(e["loc"], document) for e in inside if e["type"] == "missing" and _name_of(e) not in meant),
        *_wrong_values(wrong, document),
    ]
    return findings, meant | {*missing} | {key for e in (*wrong, *inside) for key in _broken(e["loc"])}


def _name_of(error: ErrorDetails) -> str:
    """`data.train.source`: a key of a block inside a value, apart from where it stands."""
    return dotted((*error["loc"][:2], error["loc"][-1]))


def _broken(loc: KeyPath) -> list[str]:
    """The keys that an error at `loc` leaves without a value: one, or all of a block."""
    if loc[0] in blocks() and len(loc) == 1:
        return [key for key in keys() if key.startswith(f"{loc[0]}.")]
    return [dotted(loc[:2] if loc[0] in blocks() else loc[:1])]


def _wrong_values(errors: list[ErrorDetails], document: Document) -> Iterable[Finding]:
    """One finding per value: the branches of a union speak together, and only those that got furthest into it."""
    located = [(path_in(e["loc"], document.values), e) for e in errors]
    for key, several in groupby(located, key=lambda pair: pair[0][:2]):
        group = list(several)
        deepest = max(len(path) for path, _ in group)
        for path, same in groupby((pair for pair in group if len(pair[0]) == deepest), key=lambda pair: pair[0]):
            yield _wrong_value(dotted(key), path, [e for _, e in same], document)


def _wrong_value(key: str, path: KeyPath, errors: list[ErrorDetails], document: Document) -> Finding:
    place, given = document.places[path], errors[0]["input"]
    if any(e["type"] in EMPTY for e in errors):
        return place.problem(f"`{dotted(path)}` is empty", _inner_fix(path, given) or _example(place, key))
    phrases = dict.fromkeys(MUST_BE[e["type"]](e.get("ctx", {})) for e in errors)
    what = f"`{dotted(path)}` must be {' or '.join(phrases)}, not {_described(given)}"
    return place.problem(what, _inner_fix(path, given) or _fix(place, key, errors, given))


def _described(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a block of keys" if isinstance(value, dict) else "a list"
    return "`null`" if value is None else f"`{shown(str(value), most=60)}`"


def _fix(place: Place, key: str, errors: list[ErrorDetails], given: Any) -> str:
    kinds = {e["type"] for e in errors}
    if "model_type" in kinds:
        return _block_fix(key, given)
    if given is None and not keys()[key].is_required():
        return f"leave the line out for the default, {written(place, key, keys()[key].get_default())}"
    if "list_type" in kinds and fits(key, [given]):
        return f"write {written(place, key, [given])}"
    nearest = near(
        given, [choice for e in errors if e["type"] == "literal_error" for choice in _choices(e["ctx"])], 0.5
    )
    if nearest:
        return f"write {written(place, key, [nearest] if key == 'training.trackers' else nearest)}"
    return _example(place, key)


def _inner_fix(path: KeyPath, given: Any) -> str:
    """The fix for a key of a block inside a value; '' for another path."""
    if not (found := inner_field(path)):
        return ""
    name, field = found
    if given is None and path[-1] == name and not field.is_required():
        return f"leave `{name}` out"
    value = field.examples[0] if field.examples else field.default
    return f"for example `{name}: {spelled(value)}`"


def _block_fix(block: str, given: Any) -> str:
    needed = [key for key in keys() if key.startswith(f"{block}.") and keys()[key].is_required()]
    if needed and isinstance(given, str):
        return f"write `{block}: {{{needed[0].rpartition('.')[2]}: {shown(given)}}}`"
    return f"put its keys on lines of their own under `{block}:`"


def _example(place: Place, key: str) -> str:
    field = keys()[key]
    if field.examples:
        return f"for example {written(place, key, field.examples[0])}"
    return f"for example {written(place, key, field.default)}, the default"


def _choices(limits: Mapping[str, Any]) -> list[str]:
    return re.findall(r"'([^']*)'", limits["expected"])


def _number(limit: float) -> str:
    """`1` for 1.0, which Pydantic makes of the limits of a float."""
    return f"{limit:g}" if isinstance(limit, float) else str(limit)


def _one_of(choices: list[str]) -> str:
    quoted = [f"`{choice}`" for choice in choices]
    return quoted[0] if len(quoted) == 1 else f"one of {', '.join(quoted)}"


def _missing(loc: KeyPath) -> list[str]:
    """A missing block stands for its needed keys."""
    return [key for key in keys() if keys()[key].is_required() and (key == dotted(loc) or key.startswith(f"{loc[0]}."))]


def _needed(key: str, document: Document) -> Finding:
    block, _, name = key.partition(".")
    example = keys()[key].examples[0]
    if (block,) in document.keys:
        return document.keys[(block,)].problem(f"`{key}` is needed", f"add `{name}: {example}` under `{block}:`")
    place = document.source.at()
    return place.problem(f"`{key}` is needed", f"add `{block}: {{{name}: {example}}}`", quoted=False)


def _needed_inside(loc: KeyPath, document: Document) -> Finding:
    path, (name, field) = path_in(loc, document.values), inner_field(path_in(loc, document.values) + loc[-1:])
    return document.places[path].problem(
        f"`{dotted(path)}.{name}` is needed", f"add `{name}`, as in `{spelled({name: field.examples[0]})}`"
    )
