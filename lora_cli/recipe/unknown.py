"""Keys that no recipe has: secrets, other tools' names, keys in the wrong block, and slips of the pen."""

from typing import Any

from lora_cli.recipe.document import Document, Finding, KeyPath, Place, looks_secret, shown
from lora_cli.recipe.other_tools import Foreign, foreign, foreign_names
from lora_cli.recipe.schema import Inner, Recipe, blocks, inner_of, keys
from lora_cli.recipe.spelling import dotted, fits, near, path_in, written

# How other tools call the keys of a source, where that is not a name of ours elsewhere
SOURCE_KEYS = {
    **dict.fromkeys(("path", "file", "file_name", "data_files", "dataset", "dataset_name", "hf_hub_url"), "source"),
    **dict.fromkeys(("name", "subset", "config_name"), "config"),
    **dict.fromkeys(("type", "formatting"), "format"),
    **dict.fromkeys(("ratio", "probability", "probs", "proportion"), "share"),
}

SWITCHED_OFF = {"false", "no", "off", "0", "none"}


def unknown_key(loc: KeyPath, document: Document) -> tuple[Finding, str]:
    """The finding, and the dotted key that was meant ('' where that is anybody's guess)."""
    path = path_in(loc, document.values)
    place, name, value = document.keys[path], str(path[-1]), _value_at(document.values, path)
    if looks_secret(name):
        what = f"`{dotted(path)}` looks like a secret, and a recipe holds none"
        return place.problem(what, "remove it; tokens come from the environment (`HF_TOKEN`) or `hf auth login`"), ""
    if inner := inner_of(path):
        return _unknown_inside(path, place, inner)
    if other := foreign(name):
        what = f"`{shown(name)}` is {other.owner} name; here it is {other.here}"
        return place.problem(what, _foreign_fix(place, path, other, value)), other.key
    home = _home(name, value)
    if home:
        block = home.partition(".")[0]
        what = f"`{name}` belongs {f'under `{block}`' if '.' in home else 'at the top level'}"
        if "." in name:
            what = f"`{name}` is written with a dot"
        return place.problem(what, _move(place, home, value)), home
    nearest, other = _nearest_key(path, value), _nearest_foreign(name, value)
    what = f"`{dotted(path)}` is not a recipe key"
    if other and near(name, (nearest.rpartition(".")[2], other), 0) == other:
        meant = foreign_names()[other]
        what += f"; {meant.owner} `{other}` is {meant.here} here"
        return place.problem(what, _foreign_fix(place, path, meant, value)), meant.key
    return place.problem(what, _rename(place, path, nearest, value) if nearest else _known(path)), nearest


def _unknown_inside(path: KeyPath, place: Place, inner: Inner) -> tuple[Finding, str]:
    name, fields = str(path[-1]), inner.block.model_fields
    theirs = SOURCE_KEYS if inner.of == "a source" else {}
    nearest = near(name, (*fields, *theirs), 0.6)
    meant = theirs.get(nearest, nearest)
    fix = f"rename it to `{meant}`" if meant else f"the keys of {inner.of} are {', '.join(fields)}"
    finding = place.problem(f"`{dotted(path)}` is not a key of {inner.of}", fix)
    return finding, dotted((*path[:2], meant)) if meant and fields[meant].is_required() else ""


def _value_at(values: Any, path: KeyPath) -> Any:
    for part in path:
        values = values[part]
    return values


def _home(name: str, value: Any) -> str:
    """The one key of this very name in another block; a `train:` that holds keys is no misplaced `data.train`."""
    homes = [key for key in keys() if name in (key, key.rpartition(".")[2])]
    pattern = homes and homes[0].endswith("_pattern")
    return homes[0] if homes and (pattern or not isinstance(value, dict)) else ""


def _nearest_key(path: KeyPath, value: Any) -> str:
    """The nearest name in the same block, then among the blocks, then anywhere."""
    name = str(path[-1])
    if len(path) == 2 and (here := near(name, blocks()[str(path[0])].model_fields, 0.6)):
        return f"{path[0]}.{here}"
    if (
        len(path) == 1
        and (here := near(name, Recipe.model_fields, 0.6))
        and isinstance(value, dict) == (here in blocks())
    ):
        return here
    names = {key.rpartition(".")[2]: key for key in keys()}
    return names.get(near(name, names, 0.75), "") if not isinstance(value, dict) else ""


def _nearest_foreign(name: str, value: Any) -> str:
    """Which other tool's name this may be a slip of; those are many, so it must be nearer than one of ours."""
    return "" if isinstance(value, dict) else near(name.replace("-", "_"), foreign_names(), 0.75)


def _rename(place: Place, path: KeyPath, key: str, value: Any) -> str:
    if key in blocks() or key.rpartition(".")[0] == dotted(path[:-1]):
        return f"rename it to `{key}`"
    return _move(place, key, value)


def _move(place: Place, key: str, value: Any) -> str:
    if place.source.is_override:
        return f"write {written(place, key, value)}"
    block = key.rpartition(".")[0]
    return f"write {written(place, key, value)} {f'under `{block}:`' if block else 'at the top level'}"


def _foreign_fix(place: Place, path: KeyPath, other: Foreign, value: Any) -> str:
    if other.derived:
        return f"remove it; `{other.key}` = micro_batch_size × accumulation × devices"
    if other.value and str(value).lower() in SWITCHED_OFF:
        return "remove it; off is the default"
    if other.value:
        return _move(place, other.key, other.value)
    if other.same and fits(other.key, value):
        return _rename(place, path, other.key, value)
    field = keys()[other.key]
    return _move(place, other.key, (field.examples or [field.default])[0]).replace("write", "for example", 1)


def _known(path: KeyPath) -> str:
    if len(path) == 1:
        return f"the blocks of a recipe are {', '.join(f'`{name}`' for name in blocks())}, and `output` beside them"
    return f"the keys of `{path[0]}` are {', '.join(blocks()[str(path[0])].model_fields)}"
