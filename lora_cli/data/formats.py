"""What the columns of a row mean: row -> Conversation, Instruction or Text. One function a format, and their table.

Every function raises BadRow where the row does not fit, and NothingToLearn where it fits but has an empty answer.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lora_cli.data.sources import quote
from lora_cli.data.types import BadRow, Conversation, Instruction, Item, Message, NothingToLearn, Span, Text

Columns = Mapping[str, Any]

ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
SHAREGPT_ROLES = {**ROLES, "human": "user", "gpt": "assistant"}
# Parts of a message that would change what the model reads: to leave them out in silence would train something else
UNREAD = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "weight")


@dataclass(frozen=True)
class Format:
    """`needs`: the columns that must be there, each with its synonyms, which serve if just one of them is there."""

    needs: tuple[tuple[str, ...], ...]
    parse: Callable[[Columns], Item]

    def fits(self, columns: Collection[str]) -> bool:
        return all(_chosen(synonyms, columns) for synonyms in self.needs)

    def __str__(self) -> str:
        return " + ".join("|".join(synonyms) for synonyms in self.needs)


def detect(columns: Collection[str]) -> str | None:
    """The first format of the table whose columns are there."""
    return next((name for name, format in FORMATS.items() if format.fits(columns)), None)


def _chosen(synonyms: tuple[str, ...], columns: Collection[str]) -> str | None:
    there = [name for name in synonyms if name in columns]
    return there[0] if len(there) == 1 or synonyms[0] in there else None


def messages(row: Columns) -> Conversation:
    """{"messages": [{"role", "content", "train"?}], "system"?}: turns in OpenAI's words."""
    return _conversation(row, column="messages", role="role", content="content", roles=ROLES)


def sharegpt(row: Columns) -> Conversation:
    """{"conversations": [{"from", "value"}], "system"?}: turns in ShareGPT's words."""
    return _conversation(row, column="conversations", role="from", content="value", roles=SHAREGPT_ROLES)


def alpaca(row: Columns) -> Instruction:
    """{"instruction", "input"?, "output"}: Stanford Alpaca's columns."""
    return Instruction(
        instruction=_string(row, "instruction"),
        input=_string(row, "input") if row.get("input") is not None else "",
        output=_answer(row, "output"),
    )


def completion(row: Columns) -> Text:
    """{"prompt", "completion"}: text that is read, and text that is learned; also `response` or `output`."""
    name = _chosen(COMPLETIONS, row) or COMPLETIONS[0]
    return Text((Span(_string(row, "prompt"), train=False), Span(_answer(row, name), train=True)))


def text(row: Columns) -> Text:
    """{"text"}: a document, learned as a whole."""
    return Text((Span(_answer(row, "text"), train=True),))


def _conversation(row: Columns, *, column: str, role: str, content: str, roles: Mapping[str, str]) -> Conversation:
    turns = row.get(column)
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"`{column}` is missing" if turns is None else f"`{column}` is not a list of turns")
    if row.get("tools"):
        raise BadRow("`tools` cannot be read yet", fix="leave the rows with tools out")
    found = [_message(turn, f"{column}[{i}]", role=role, content=content, roles=roles) for i, turn in enumerate(turns)]
    if row.get("system"):
        found.insert(0, Message("system", _string(row, "system"), train=False))
    if not any(message.role == "assistant" for message in found):
        raise BadRow(f"`{column}` has no assistant turn", fix="add an answer, or leave the row out")
    if not any(message.train for message in found):
        raise BadRow(f"every assistant turn of `{column}` has `train: false`")
    return Conversation(tuple(found))


def _message(turn: Any, place: str, *, role: str, content: str, roles: Mapping[str, str]) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRow(f"`{place}` is not an object with `{role}` and `{content}`")
    if unread := next((key for key in UNREAD if turn.get(key) is not None), None):
        raise BadRow(f"`{place}.{unread}` cannot be read yet", fix=f"leave the rows with `{unread}` out")
    if (name := _string(turn, role, place)) not in roles:
        known = ", ".join(roles)
        raise BadRow(f"`{place}.{role}` is `{quote(name)}`, not a role", fix=f"the roles are {known}")
    said = _string(turn, content, place)
    train = turn.get("train")
    if train is None:
        train = roles[name] == "assistant"
    if not isinstance(train, bool) or (train and roles[name] != "assistant"):
        raise BadRow(f"`{place}.train` is for assistant turns, and true or false")
    if train and not said.strip():
        raise NothingToLearn(f"`{place}.{content}` is an empty answer")
    return Message(roles[name], said, train)


def _answer(row: Columns, name: str) -> str:
    value = _string(row, name)
    if not value.strip():
        raise NothingToLearn(f"`{name}` is empty")
    return value


def _string(row: Columns, name: str, place: str = "") -> str:
    path = f"{place}.{name}" if place else name
    value = row.get(name)
    if value is None:
        raise BadRow(f"`{path}` is missing")
    if not isinstance(value, str):
        raise BadRow(f"`{path}` is not text: {quote(str(value))}", fix=f"write `{name}` as a string")
    return value


COMPLETIONS = ("completion", "response", "output")

# In the order in which `auto` tries them: tatsu-lab/alpaca, for one, has a `text` column beside its three
FORMATS: dict[str, Format] = {
    "messages": Format((("messages",),), messages),
    "sharegpt": Format((("conversations",),), sharegpt),
    "alpaca": Format((("instruction",), ("output",)), alpaca),
    "completion": Format((("prompt",), COMPLETIONS), completion),
    "text": Format((("text",),), text),
}
