"""`data.template`: text with fields of a row, and marks around what of it is trained.

    "Q: {question}\\nA: [[{answer}]]"   ->   read `Q: `, question, `\\nA: `; train answer

`{{` and `}}` stand for braces. A prompt is asked through the part before the first mark.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

PIECE = re.compile(r"\{\{|\}\}|\{([^{}\n]+)\}|\[\[|\]\]|[{}]|[^{}\[\]]+|[\[\]]")


@dataclass(frozen=True)
class Part:
    """Text as it stands, or the name of the column whose text stands there."""

    text: str
    is_field: bool
    train: bool


def parse_template(template: str) -> tuple[Part, ...]:
    """The parts in order; white space behind the last mark is dropped. ValueError says what a template must be."""
    parts, train = [], False
    for piece in PIECE.finditer(template.rstrip()):
        text, name = piece[0], piece[1]
        if text in ("[[", "]]"):
            if train == (text == "[["):
                raise ValueError("text in which each `[[` is closed by a `]]`")
            train = not train
        elif text in ("{", "}"):
            raise ValueError("text whose fields are written `{name}`, and whose other braces are doubled")
        else:
            parts.append(Part(name or {"{{": "{", "}}": "}"}.get(text, text), bool(name), train))
    if train:
        raise ValueError("text in which each `[[` is closed by a `]]`")
    if not any(part.train and part.is_field for part in parts):
        last = next((part.text for part in reversed(parts) if part.is_field), "answer")
        raise ValueError(f"text with `[[…]]` around what is trained, such as `[[{{{last}}}]]`")
    if not parts[-1].train:
        raise ValueError("text that ends with what is trained, for the end token is put behind it")
    return tuple(parts)


def prompt_text(template: str, prompt: str) -> str:
    """The template up to its first mark, with the prompt in it: as the text of its one field, or as a JSON object that
    has a text for each. Where there is no field the prompt stands behind it, and is what the answer begins with.

    ValueError says what is wrong with the prompt.
    """
    parts = _before_the_answer(template)
    texts = _texts(prompt, _fields(parts))
    written = "".join(texts[part.text] if part.is_field else part.text for part in parts)
    return written if texts else written + prompt


def how_to_ask(template: str) -> str:
    """The fix for a prompt that does not fill a template of several fields."""
    fields = ", ".join(f'"{name}": "…"' for name in _fields(_before_the_answer(template)))
    return f"give a text for each field, as JSON: {{{fields}}}"


def _before_the_answer(template: str) -> list[Part]:
    return list(takewhile(lambda part: not part.train, parse_template(template)))


def _fields(parts: Sequence[Part]) -> list[str]:
    return list(dict.fromkeys(part.text for part in parts if part.is_field))


def _texts(prompt: str, fields: Sequence[str]) -> Mapping[str, str]:
    """Field -> its text; numbers are written out, as in rows."""
    try:
        found = json.loads(prompt)
    except (ValueError, RecursionError):
        found = None
    gives_all = isinstance(found, dict) and bool(fields) and set(found) == set(fields)
    if gives_all and all(type(value) in (str, int, float) for value in found.values()):
        return {name: str(value) for name, value in found.items()}
    if len(fields) > 1:
        raise ValueError(f"`data.template` asks with {len(fields)} fields, and this prompt does not give them")
    return dict.fromkeys(fields, prompt)
