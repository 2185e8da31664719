"""How keys and values are written in messages, and which name is near another."""

import difflib
import json
import re
from collections.abc import Iterable
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lora_cli.recipe.document import KeyPath, Place, shown
from lora_cli.recipe.schema import keys


def dotted(path: KeyPath) -> str:
    """`lora.layers[1]`, `lora.rank_pattern.q_proj`."""
    return re.sub(r"\.\[", "[", ".".join(f"[{part}]" if isinstance(part, int) else shown(part) for part in path))


def written(place: Place, key: str, value: Any) -> str:
    """How `value` for `key` is written there: `r: 8` in a file, `--set lora.r=8` on the command line."""
    text = spelled(value)
    return f"`--set {key}={text}`" if place.source.is_override else f"`{key.rpartition('.')[2]}: {text}`"


def spelled(value: Any) -> str:
    """A value as YAML flow text."""
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, list):
        return f"[{', '.join(map(spelled, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {spelled(inner)}' for key, inner in value.items())}}}"
    return json.dumps(value)


def near(given: Any, names: Iterable[str], cutoff: float) -> str:
    found = difflib.get_close_matches(str(given).lower(), list(names), n=1, cutoff=cutoff)
    return found[0] if found else ""


def path_in(loc: KeyPath, values: Any) -> KeyPath:
    """The part of Pydantic's `loc` that is in the document: branches of unions are not."""
    path: list[str | int] = []
    for part in loc:
        if (isinstance(values, dict) and part in values) or (isinstance(values, list) and isinstance(part, int)):
            path.append(part)
            values = values[part]
    return tuple(path)


def fits(key: str, value: Any) -> bool:
    """Whether a value as written has the type of the key (its limits apart)."""
    try:
        TypeAdapter(keys()[key].annotation).validate_python(value)
    except ValidationError:
        return False
    return True
