"""`data.template`: text with fields of a row, and marks around what of it is trained.

    "Q: {question}\\nA: [[{answer}]]"   ->   read `Q: `, question, `\\nA: `; train answer

`{{` and `}}` stand for braces.
"""

import re
from dataclasses import dataclass

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
        raise ValueError("text with `[[…]]` around what is trained, such as `[[{answer}]]`")
    if not parts[-1].train:
        raise ValueError("text that ends with what is trained, for the end token is put behind it")
    return tuple(parts)
