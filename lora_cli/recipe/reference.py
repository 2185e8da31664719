"""The schema as documents: docs/recipe.md for people, a JSON Schema for editors."""

from typing import Any

from pydantic.fields import FieldInfo

from lora_cli.recipe.other_tools import foreign_names
from lora_cli.recipe.schema import Classify, Recipe, Source, blocks, keys
from lora_cli.recipe.spelling import spelled

EXAMPLE = """\
# yaml-language-server: $schema=recipe.schema.json
model:
  base: HuggingFaceTB/SmolLM2-135M-Instruct
lora:
  r: 16
  targets: qkvo
data:
  train: train.jsonl
  eval: 5%
training:
  epochs: 3
  learning_rate: 2e-4
output: out/
"""

INTRODUCTION = f"""\
# The recipe, key by key

A recipe is one YAML file: what to adapt, how, on which rows, for how long. Two keys are needed, `model.base` and
`data.train`; the others have defaults.

```yaml
{EXAMPLE}```

`lora train recipe.yaml` runs it, `--set lora.r=32` changes a key for one run, `--dry-run` prints every value with its
origin. An unknown key, a wrong value or a key given twice is an error with its line and column; all of them are
told at once, before anything is loaded. Values are read by the type of their key: `1e-4` is a number, and a revision
`010` stays text. Data files are relative to the recipe; `output` and a local `model.base` to the current folder.

The first line of the example gives an editor that speaks the YAML language server these keys as completions:
[recipe.schema.json](recipe.schema.json).
"""

SOURCES = """\
### Sources

An entry of `data.train` is a path, a hub id, or a block of these keys:

```yaml
data:
  train:
    - chats.jsonl
    - {source: HuggingFaceH4/no_robots, split: train, weight: 0.5}
    - {source: faq.csv.gz, weight: 2, columns: {prompt: question, completion: answer}}
```

`weight` says how often an epoch takes each row: 2 is twice, 0.5 takes half of the rows, in each epoch others. With
`share` an epoch has as many rows as all sources together, in these proportions. Rows are counted as examples, after
those with nothing to learn are left out. The mix is a function of `training.seed` and the epoch.

"""

OBJECTIVES = """\
### Objectives

`objective: classify` trains a classifier: rows have a `text` and a `label` (a word or a whole number), and perhaps a
`text_pair` that is read behind the text. Of an encoder (BERT, RoBERTa …) or a decoder (Llama, Qwen …), a new head with
an output for each label is trained whole beside the LoRA layers. With options it is a block of these keys:

```yaml
training:
  objective: {kind: classify, labels: [ham, spam]}
```

"""

NAMES = """\
## Names from other tools

Found in a recipe, these are errors that say what the key is called here. ≈ marks those whose values read differently.

| theirs | whose | here |
| --- | --- | --- |
"""


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, with the sentence of each key as its description."""
    schema = Recipe.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_without_titles(schema),
        "title": "lora recipe",
    }


def recipe_page() -> str:
    """docs/recipe.md."""
    parts = [INTRODUCTION]
    for name, block in blocks().items():
        inner = {key.partition(".")[2]: field for key, field in keys().items() if key.startswith(f"{name}.")}
        parts.append(f"## `{name}`\n\n{block.__doc__}\n\n{_table(inner)}")
        if name == "data":
            parts.append(SOURCES + _table(Source.model_fields))
        if name == "training":
            parts.append(OBJECTIVES + _table(Classify.model_fields))
    parts.append(f"## Beside the blocks\n\n{_table({key: field for key, field in keys().items() if '.' not in key})}")
    rows = (f"| `{name}` | {other.tool} | {_here(name)} |" for name, other in sorted(foreign_names().items()))
    parts.append(NAMES + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _here(name: str) -> str:
    other = foreign_names()[name]
    return other.here if other.same or other.derived else f"≈ {other.here}"


def _table(fields: dict[str, FieldInfo]) -> str:
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    shapes = _shapes()
    for name, field in fields.items():
        default = "**needed**" if field.is_required() else f"`{spelled(field.get_default())}`"
        rows.append(f"| `{name}` | {_type(shapes[id(field)])} | {default} | {field.description} |")
    return "\n".join(rows) + "\n"


def _shapes() -> dict[int, dict[str, Any]]:
    """The JSON Schema of each key, by the identity of its field."""
    schema = Recipe.model_json_schema()
    found = {}
    for inner in (Source, Classify):
        for name, field in inner.model_fields.items():
            found[id(field)] = schema["$defs"][inner.__name__]["properties"][name]
    for key, field in keys().items():
        block, _, name = key.rpartition(".")
        properties = schema["$defs"][blocks()[block].__name__]["properties"] if block else schema["properties"]
        found[id(field)] = properties[name]
    return found


def _type(shape: dict[str, Any]) -> str:
    """`whole number ≥ 1 or null` from a JSON Schema."""
    if branches := shape.get("anyOf") or shape.get("oneOf"):
        return " or ".join(_type(branch) for branch in branches)
    if "$ref" in shape:
        return REFERENCES[shape["$ref"].rpartition("/")[2]]
    if "const" in shape or "enum" in shape:
        return ", ".join(f"`{choice}`" for choice in shape.get("enum", [shape.get("const")]))
    if shape["type"] == "array":
        return f"list of {_type(shape['items'])}"
    if shape["type"] == "object":
        return f"name: {_type(shape['additionalProperties'])}"
    return " ".join(filter(None, (TYPES[shape["type"]], _limits(shape))))


REFERENCES = {"Source": "a source", "Classify": "a block"}
TYPES = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text", "null": "null"}
SIGNS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _limits(shape: dict[str, Any]) -> str:
    return ", ".join(f"{sign} {shape[limit]}" for limit, sign in SIGNS.items() if limit in shape)


def _without_titles(node: Any) -> Any:
    """Pydantic's titles only repeat the names."""
    if isinstance(node, list):
        return [_without_titles(inner) for inner in node]
    if not isinstance(node, dict):
        return node
    return {
        key: _without_titles(inner) for key, inner in node.items() if not (key == "title" and isinstance(inner, str))
    }
