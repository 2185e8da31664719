"""A tokenizer's chat template, run as the foreign code it is: sandboxed by transformers, and bounded by us in size, time,
memory and output. It sees messages and tools, and nothing else.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateSyntaxError
from jinja2.exceptions import SecurityError

from lora_cli.data.sources import quote
from lora_cli.data.types import BadRow
from lora_cli.errors import ModelError, Problem, SafetyError, UserError, first_line
from lora_cli.limits import Exceeded, bounded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_CHARACTERS = 64_000  # the longest of the popular models' has 16,000
MOST_SECONDS = 2  # of processor time for one rendering, which takes a millisecond
MOST_BYTES = 1_000_000_000
MOST_OUTPUT = 1_000_000  # characters, beside COPIES of what was put in
COPIES = 10
FIX = "use the tokenizer of a model that you trust"

TOKENIZED_A_SECOND = 50_000  # characters; tokenizers do some twenty times as many

Turns = Sequence[Mapping[str, Any]]
Tools = Sequence[Any]


def check_size(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise SafetyError for a template that is longer than any needs to be, ModelError for what is none."""
    found = tokenizer.chat_template or {}
    texts = list(found.values()) if isinstance(found, dict) else [found]
    if not all(isinstance(text, str) for text in texts) or (
        isinstance(found, dict) and found and "default" not in found
    ):
        what = "`chat_template` is not a text, nor several of which one is called `default`"
        raise ModelError(Problem(what, where=_named(tokenizer), fix="name the one to use `default`, or take it out"))
    if (longest := max(map(len, texts), default=0)) > MOST_CHARACTERS:
        what = f"the chat template has {longest:,} characters, and {MOST_CHARACTERS:,} is the most that is run"
        raise SafetyError(Problem(what, where=_named(tokenizer), fix=FIX))


def rendered(
    tokenizer: "PreTrainedTokenizerBase", turns: Turns, tools: Tools = (), *, add_generation_prompt: bool = False
) -> str:
    """The conversation as text. Raises BadRow where the template refuses it, ModelError where it is no template, and
    SafetyError where it takes too much or reaches out of its sandbox."""
    text = _run(
        tokenizer, list(turns), tools, MOST_SECONDS, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    if _is_too_long(text, turns, tools):
        raise SafetyError(_too_much(tokenizer, f"{len(text):,} characters"))
    return text


def rendered_together(
    tokenizer: "PreTrainedTokenizerBase", talks: Sequence[Turns], tools: Tools = (), *, add_generation_prompt: bool
) -> list[str] | None:
    """What `rendered` gives for each, at a fraction of its cost, for all of them are held to the bounds of one.

    None where one is refused or they take too much together: `rendered` then says which, and why.
    """
    how = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
    try:
        texts = _run(tokenizer, [list(turns) for turns in talks], tools, MOST_SECONDS, **how)
    except (BadRow, UserError):
        return None
    too_long = any(_is_too_long(text, turns, tools) for text, turns in zip(texts, talks, strict=True))
    return None if too_long else texts


def tokenized(tokenizer: "PreTrainedTokenizerBase", turns: Turns, tools: Tools = (), **how: bool) -> Mapping[str, Any]:
    """The conversation as tokens, as everybody else gets them: `how` are options of `apply_chat_template`."""
    seconds = MOST_SECONDS + _size(turns, tools) / TOKENIZED_A_SECOND
    return _run(tokenizer, list(turns), tools, seconds, return_dict=True, tokenizer_kwargs={"verbose": False}, **how)


def _run(tokenizer: "PreTrainedTokenizerBase", asked: list[Any], tools: Tools, seconds: float, **how: Any) -> Any:
    """`asked` are the turns of a conversation, or several of them."""
    render = partial(tokenizer.apply_chat_template, asked, tools=list(tools) or None, **how)
    try:
        return bounded(render, seconds=seconds, most_bytes=MOST_BYTES)
    except Exceeded as error:
        raise SafetyError(_too_much(tokenizer, str(error))) from error
    except SecurityError as error:
        what = f"the chat template reaches out of its sandbox: {quote(first_line(error))}"
        raise SafetyError(Problem(what, where=_named(tokenizer), fix=FIX)) from error
    except TemplateSyntaxError as error:
        what = f"the chat template can't be read: {quote(first_line(error))}"
        raise ModelError(Problem(what, where=f"{_named(tokenizer)}, line {error.lineno}", fix=FIX)) from error
    except Exception as error:  # whatever a template raises, it refuses the row
        raise BadRow(f"the chat template refuses it: {quote(first_line(error))}") from error


def _too_much(tokenizer: "PreTrainedTokenizerBase", what: str) -> Problem:
    return Problem(f"the chat template takes more than {what} for one conversation", where=_named(tokenizer), fix=FIX)


def _is_too_long(text: str, turns: Turns, tools: Tools) -> bool:
    return len(text) > MOST_OUTPUT and len(text) > MOST_OUTPUT + COPIES * _size(turns, tools)


def _size(turns: Turns, tools: Tools) -> int:
    """Characters that go in."""
    return len(repr(turns)) + len(repr(tools))


def _named(tokenizer: "PreTrainedTokenizerBase") -> str:
    return str(tokenizer.name_or_path)
