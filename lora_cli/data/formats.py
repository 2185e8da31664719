"""What the columns of a row mean: row -> Conversation, Instruction, Text, Tokens, Labelled or Preference. One function a format, their table.

Every function raises BadRow where the row does not fit, and NothingToLearn where it fits but has an empty answer.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from typing import Any

from lora_cli.data.sources import quote
from lora_cli.data.types import (
    CHOSEN,
    IGNORE,
    REJECTED,
    BadRow,
    Conversation,
    Instruction,
    Item,
    Labelled,
    Message,
    NothingToLearn,
    Preference,
    Span,
    Text,
    Tokens,
)
from lora_cli.recipe.template import Part, parse_template

Columns = Mapping[str, Any]

ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
SHAREGPT_ROLES = {**ROLES, "human": "user", "gpt": "assistant"}
# What the template reads of a message beside role and content
PASSED_ON = ("tool_calls", "reasoning_content", "reasoning", "thinking", "tool_call_id", "name")
# Parts of a message that would change what the model reads: to leave them out in silence would train something else
UNREAD = ("function_call",)


@dataclass(frozen=True)
class Format:
    """`needs`: the columns that must be there, each with its synonyms, which serve if just one of them is there.

    `takes`: the columns that may be there.
    """

    needs: tuple[tuple[str, ...], ...]
    parse: Callable[[Columns], Item]
    takes: tuple[str, ...] = ()

    def fits(self, columns: Collection[str]) -> bool:
        return all(_chosen(synonyms, columns) for synonyms in self.needs)

    def __str__(self) -> str:
        return " + ".join("|".join(synonyms) for synonyms in self.needs)


def detect(columns: Collection[str]) -> str | None:
    """The first format of the table whose columns are there; `labelled` is chosen by the objective, never by columns."""
    return next((name for name, format in FORMATS.items() if name != LABELLED and format.fits(columns)), None)


def _chosen(synonyms: tuple[str, ...], columns: Collection[str]) -> str | None:
    there = [name for name in synonyms if name in columns]
    return there[0] if len(there) == 1 or synonyms[0] in there else None


def known_columns() -> list[str]:
    """Every column that some format reads."""
    needed = [name for format in FORMATS.values() for synonyms in format.needs for name in synonyms]
    return list(dict.fromkeys([*needed, *(name for format in FORMATS.values() for name in format.takes)]))


def templated(template: str) -> Format:
    """The format that a `data.template` describes."""
    parts = parse_template(template)
    return Format(tuple(dict.fromkeys((part.text,) for part in parts if part.is_field)), partial(_fill, parts))


def messages(row: Columns) -> Conversation:
    """{"messages": [{"role", "content", "train"?, "weight"?, "tool_calls"? …}], "system"?, "tools"?}: OpenAI's words."""
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


def tokens(row: Columns) -> Tokens:
    """{"input_ids", "labels"?}: tokens, of which those with a label of -100 are not learned; without labels all are."""
    input_ids = _ids(row, "input_ids")
    labels = _ids(row, "labels") if row.get("labels") is not None else input_ids
    if len(labels) != len(input_ids):
        raise BadRow(f"`labels` has {len(labels):,} entries, and `input_ids` {len(input_ids):,}")
    for place, (token, wanted) in enumerate(zip(input_ids, labels, strict=True)):
        if token < 0:
            raise BadRow(f"`input_ids[{place}]` is {token}, not a token", fix="give the tokenizer's numbers, from 0 on")
        if wanted not in (token, IGNORE):
            raise BadRow(
                f"`labels[{place}]` is {wanted}, and the token there is {token}",
                fix=f"give each token itself as its label, or {IGNORE}; they are shifted later",
            )
    if 0 in (row.get("attention_mask") or ()):
        raise BadRow("`attention_mask` says that the row is padded", fix="leave the padding out")
    weights = [float(label != IGNORE) for label in labels]
    weights[:1] = [0.0]  # nothing stands before the first token that could predict it
    if not any(weights):
        raise NothingToLearn("no token has a label")
    return Tokens(tuple(input_ids), tuple(weights))


def labelled(row: Columns) -> Labelled:
    """{"text", "label", "text_pair"?}: a text, perhaps two, and its class: a word or a whole number."""
    label = row.get("label")
    if label is None:
        raise BadRow("`label` is missing")
    if type(label) not in (str, int) or not str(label).strip():
        raise BadRow(f"`label` is no word and no whole number: {quote(str(label))}")
    pair = _string(row, "text_pair") if row.get("text_pair") is not None else None
    return Labelled(_answer(row, "text"), str(label), pair)


def preference(row: Columns) -> Preference:
    """{"prompt"?, "chosen", "rejected"}: two answers to one prompt, of which `chosen` is the better one.

    As texts, they follow a `prompt`, as it stands, or a `question` or `instruction`, as a chat; or they bring the prompt,
    which is what both begin with. As turns, they follow the turns or the text of the prompt, or bring them too.
    """
    if isinstance(row.get(CHOSEN), str) and isinstance(row.get(REJECTED), str):
        chosen, rejected = _answers(row)
    else:
        chosen, rejected = _answering_turns(row)
    if chosen == rejected:
        raise BadRow("`chosen` and `rejected` are the same", fix="take the row out: it prefers nothing")
    return Preference(chosen, rejected)


def _answers(row: Columns) -> tuple[Instruction | Conversation | Text, ...]:
    """Both sides, where they are texts."""
    asked = _chosen(ASKED, row)
    if asked == "prompt":
        prompt = Span(_string(row, "prompt"), train=False)
        return tuple(Text((prompt, Span(_answer(row, side), train=True))) for side in (CHOSEN, REJECTED))
    if asked and row.get("system"):
        turns = (Message("system", _string(row, "system"), False), Message("user", _string(row, asked), False))
        return tuple(Conversation((*turns, Message("assistant", _answer(row, s), True))) for s in (CHOSEN, REJECTED))
    if asked:
        return tuple(alpaca({**row, "instruction": row[asked], "output": row[s]}) for s in (CHOSEN, REJECTED))
    texts = [_answer(row, side) for side in (CHOSEN, REJECTED)]
    prompt = _shared_text(*texts)
    return tuple(Text((Span(prompt, train=False), Span(text[len(prompt) :], train=True))) for text in texts)


def _shared_text(chosen: str, rejected: str) -> str:
    """What both begin with, up to the white space before the word in which they differ."""
    differ = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    begin = WORDS_BEFORE_WHITE_SPACE.match(chosen[:differ])
    same = begin[0] if begin else ""
    if not same:
        raise BadRow("`chosen` and `rejected` begin differently, and there is no prompt", fix="add a column `prompt`")
    return same


def _answering_turns(row: Columns) -> tuple[Conversation, Conversation]:
    """Both sides, where they are turns: what they begin with alike is the prompt."""
    name = _chosen(ASKED, row)
    prompt = [] if name is None or isinstance(row[name], str) else _turns(row[name], name)
    asked = row[name] if name is not None and not prompt else None
    chosen, rejected = (_with_prompt(prompt, asked, _turns(row.get(s), s), s) for s in (CHOSEN, REJECTED))
    if row.get("system"):
        chosen, rejected = ([Message("system", _string(row, "system"), train=False), *s] for s in (chosen, rejected))
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if same is None and len(chosen) == len(rejected):
        raise BadRow("`chosen` and `rejected` are the same", fix="take the row out: it prefers nothing")
    if not same or any(side[same].role != "assistant" for side in (chosen, rejected)):
        raise BadRow("`chosen` and `rejected` answer different prompts", fix="let both begin with the same turns")
    tools = _tools(row)
    return tuple(Conversation((*_read(side[:same]), *side[same:]), tools) for side in (chosen, rejected))


def _with_prompt(prompt: list[Message], asked: str | None, turns: list[Message], side: str) -> list[Message]:
    """All turns of a side, which may bring the prompt itself."""
    if turns[-1].role != "assistant":
        raise BadRow(f"`{side}` does not end with an answer", fix="end it with an assistant turn")
    if asked is None:
        return turns if _read(turns[: len(prompt)]) == _read(prompt) else [*prompt, *turns]
    if turns[0].role == "assistant":
        return [Message("user", asked, train=False), *turns]
    if not any(turn.content.strip() == asked.strip() for turn in turns):
        raise BadRow(f"`{side}` has turns before its answer, and none of them is the prompt beside it")
    return turns


def _read(turns: Sequence[Message]) -> list[Message]:
    """The turns, none of which is learned."""
    return [replace(turn, train=False) for turn in turns]


def _turns(value: Any, column: str) -> list[Message]:
    """One turn or several, in OpenAI's words or in ShareGPT's."""
    found = [value] if isinstance(value, Mapping) else value
    if not isinstance(found, list) or not found:
        what = f"`{column}` is missing" if value is None else f"`{column}` is neither text nor a list of turns"
        raise BadRow(what, fix="`chosen` and `rejected` are both texts, or both lists of turns")
    return [
        _message(turn, f"{column}[{place}]", role="from", content="value", roles=SHAREGPT_ROLES)
        if isinstance(turn, Mapping) and "from" in turn
        else _message(turn, f"{column}[{place}]", role="role", content="content", roles=ROLES)
        for place, turn in enumerate(found)
    ]


def labels_in(items: Sequence[Item]) -> list[str]:
    """The labels of the rows, sorted."""
    return sorted_labels({item.label for item in items if isinstance(item, Labelled)})


def sorted_labels(labels: Collection[str]) -> list[str]:
    """As numbers where all are."""
    return sorted(labels, key=int if all(WHOLE_NUMBER.fullmatch(label) for label in labels) else None)


def _ids(row: Columns, name: str) -> list[int]:
    value = row.get(name)
    if value is None:
        raise BadRow(f"`{name}` is missing")
    if not isinstance(value, list) or not all(type(id) is int for id in value):
        raise BadRow(f"`{name}` is not a list of whole numbers")
    return value


def _fill(parts: Sequence[Part], row: Columns) -> Text:
    """The template with the row's text in it, cut where what is trained begins or ends."""
    spans: list[Span] = []
    for part in parts:
        text = _written(row, part.text) if part.is_field else part.text
        if part.is_field and part.train and not text.strip():
            raise NothingToLearn(f"`{part.text}` is empty")
        if spans and spans[-1].train == part.train:
            spans[-1] = Span(spans[-1].text + text, part.train)
        else:
            spans.append(Span(text, part.train))
    return Text(tuple(spans))


def _written(row: Columns, name: str) -> str:
    """The text of a column of a template; numbers are written out."""
    value = row.get(name)
    return str(value) if type(value) in (int, float) else _string(row, name)


def _conversation(row: Columns, *, column: str, role: str, content: str, roles: Mapping[str, str]) -> Conversation:
    turns = row.get(column)
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"`{column}` is missing" if turns is None else f"`{column}` is not a list of turns")
    found = [_message(turn, f"{column}[{i}]", role=role, content=content, roles=roles) for i, turn in enumerate(turns)]
    if row.get("system"):
        found.insert(0, Message("system", _string(row, "system"), train=False))
    if not any(message.role == "assistant" for message in found):
        raise BadRow(f"`{column}` has no assistant turn", fix="add an answer, or leave the row out")
    if not any(message.train for message in found):
        raise BadRow(f"every assistant turn of `{column}` has `train: false` or `weight: 0`")
    return Conversation(tuple(found), _tools(row))


def _tools(row: Columns) -> tuple[Any, ...]:
    """A list of JSON schemas, or its JSON text, as tables have it whose cells cannot differ in shape."""
    found = row.get("tools") or []
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"`tools` is not JSON: {error}") from error
    if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
        raise BadRow("`tools` is not a list of JSON schemas")
    return tuple(found)


def _message(turn: Any, place: str, *, role: str, content: str, roles: Mapping[str, str]) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRow(f"`{place}` is not an object with `{role}` and `{content}`")
    if unread := next((key for key in UNREAD if turn.get(key) is not None), None):
        raise BadRow(f"`{place}.{unread}` cannot be read yet", fix=f"leave the rows with `{unread}` out")
    if (name := _string(turn, role, place)) not in roles:
        known = ", ".join(roles)
        raise BadRow(f"`{place}.{role}` is `{quote(name)}`, not a role", fix=f"the roles are {known}")
    fields = {key: turn[key] for key in PASSED_ON if turn.get(key) is not None}
    calls = bool(fields.get("tool_calls"))
    said = "" if calls and turn.get(content) is None else _string(turn, content, place)
    train, weight = _train(turn, place, roles[name]), _weight(turn, place, roles[name])
    if train and weight and not said.strip() and not calls:
        raise NothingToLearn(f"`{place}.{content}` is an empty answer")
    return Message(roles[name], said, train and weight > 0, weight or 1.0, fields)


def _train(turn: Columns, place: str, role: str) -> bool:
    train = turn.get("train")
    if train is None:
        return role == "assistant"
    if not isinstance(train, bool) or (train and role != "assistant"):
        raise BadRow(f"`{place}.train` is for assistant turns, and true or false")
    return train


def _weight(turn: Columns, place: str, role: str) -> float:
    weight = turn.get("weight")
    if weight is None:
        return 1.0
    if type(weight) not in (int, float) or not isfinite(weight) or weight < 0 or (weight and role != "assistant"):
        raise BadRow(f"`{place}.weight` is for assistant turns, and a number from 0 on")
    return float(weight)


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


LABELLED, PREFERENCE = "labelled", "preference"
WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")
ASKED = ("prompt", "question", "instruction", "messages", "conversations")  # columns before `chosen` and `rejected`
WORDS_BEFORE_WHITE_SPACE = re.compile(r".*\S(?=\s)", re.DOTALL)
COMPLETIONS = ("completion", "response", "output")

# In the order in which `auto` tries them: tatsu-lab/alpaca, for one, has a `text` column beside its three
FORMATS: dict[str, Format] = {
    "tokens": Format((("input_ids",),), tokens, takes=("labels", "attention_mask")),
    PREFERENCE: Format(((CHOSEN,), (REJECTED,)), preference, takes=(*ASKED, "input", "system", "tools")),
    "messages": Format((("messages",),), messages, takes=("system", "tools")),
    "sharegpt": Format((("conversations",),), sharegpt, takes=("system", "tools")),
    "alpaca": Format((("instruction",), ("output",)), alpaca, takes=("input",)),
    "completion": Format((("prompt",), COMPLETIONS), completion),
    "text": Format((("text",),), text),
    LABELLED: Format((("text",), ("label",)), labelled, takes=("text_pair",)),
}
