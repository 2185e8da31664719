"""From meaning to tokens: Conversation, Instruction, Text, Tokens, Labelled or Preference -> Examples, by the tokenizer's own rules.

A conversation is rendered turn by turn, as it will be at inference:

    prompt = template(messages before the answer, add_generation_prompt=True)
    whole  = template(messages up to and with the answer) = prompt + answer + stop token [+ what is never generated]

The answer and its stop token are trained. The next prompt continues the same example if its tokens begin with what is
there already. If they do not (templates that drop earlier reasoning, a token that reaches over a border), it begins a
new example: so what stands before a trained answer is always, token by token, what inference will put there. Where a
template moves a part of the prompt once it is answered (Mistral Nemo's system text), `whole` does not begin with
`prompt`; the answer is then cut out of it, and put behind the prompt of inference.

`train_on` (`data.train_on`) says what is trained: `answers`; the `last` one of a conversation; or `all` tokens up to
the last answer, each in the first example that has it.

A text that is classified is what the tokenizer makes of it, its special tokens with it; where it is longer than
`max_length`, the tokenizer cuts it, because it knows which tokens must stay.
"""

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_cli.data.chat_template import Tools, check_size, rendered, rendered_together, tokenized
from lora_cli.data.encoder import Encoder
from lora_cli.data.sources import quote
from lora_cli.data.types import (
    CHOSEN,
    REJECTED,
    BadRow,
    Conversation,
    Example,
    Instruction,
    Item,
    Labelled,
    Message,
    Preference,
    PromptForm,
    RowId,
    Span,
    Text,
)
from lora_cli.errors import DataError, ModelError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stanford Alpaca's two prompts (Taori et al. 2023), for bases that have no chat template
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
TOGETHER = 100  # conversations that are rendered at once, which takes some ten milliseconds
SHOWN_LABELS = 5  # in a message
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")

# What of a message the template must not leave out
MUST_BE_READ = ("tool_calls", "reasoning_content", "reasoning", "thinking")


class Prompt(NamedTuple):
    """What the chat template is to render."""

    messages: Sequence[Message]
    tools: Tools
    add_generation_prompt: bool

    @property
    def key(self) -> tuple[Hashable, ...]:
        """Equal for what is rendered alike; but for the turns, what can be rendered together."""
        turns = tuple((said.role, said.content, repr(said.fields) if said.fields else "") for said in self.messages)
        return turns, repr(self.tools) if self.tools else "", self.add_generation_prompt


class Renderer:
    """A tokenizer with its chat template: the one way from text to tokens, in training, evaluation and chat."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        train_on: str = "answers",
        *,
        labels: Sequence[str] = (),
        max_length: int | None = None,
    ) -> None:
        check_size(tokenizer)
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.labels = {label: number for number, label in enumerate(labels)}
        self.max_length = max_length  # of rows that are classified; others are cut by `truncate`
        self.has_template = bool(tokenizer.chat_template)
        self.tagged = self.has_template and GENERATION_TAG.search(tokenizer.get_chat_template()) is not None
        added = tokenizer.added_tokens_decoder
        self.special = {id for id, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        self._silent: dict[int, bool] = {}  # tokens that were asked about
        own = tokenizer("")["input_ids"]  # what the tokenizer puts around a text by itself
        self._bos = own[:1] if own[:1] == [tokenizer.bos_token_id] else []
        self._encode = Encoder(tokenizer)
        self._foreseen: dict[Hashable, str] = {}  # by `_key`: texts of the rows that are rendered next

    def render(self, item: Item, row: RowId) -> list[Example]:
        """One example; two for a preference; or several for a conversation whose template renders earlier turns anew.

        Raises BadRow where the template refuses the row, ModelError where no row could be rendered, and SafetyError for
        a template that is not to be run.
        """
        if isinstance(item, Labelled):
            return [self._labelled(item, row)]
        if isinstance(item, Preference):
            return [self._side(item.chosen, CHOSEN, row), self._side(item.rejected, REJECTED, row)]
        return [Example(input_ids, weights, row) for input_ids, weights in self._tokens(item, self.train_on)]

    def foresee(self, items: Iterable[Item]) -> None:
        """Render and tokenize together what `render` will ask for one by one; it changes nothing but the time that takes."""
        spans, prompts = list[str](), dict[tuple[Hashable, ...], Prompt]()
        for item, train_on in self._alone(items):
            if isinstance(item, Text):
                spans += accumulate(span.text for span in item.spans)
            elif isinstance(item, Conversation) and self.has_template:
                prompts |= {prompt.key: prompt for prompt in _prompts(item, train_on)}
        self._foreseen = self._rendered_together(prompts)
        self._encode.foresee([*spans, *self._foreseen.values()])

    def meet(self, items: Iterable[Item]) -> None:
        """Take the labels of the items for some that are learned, numbered as they come."""
        for item in items:
            if isinstance(item, Labelled):
                self.labels.setdefault(item.label, len(self.labels))

    def chat_prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """The tokens before the assistant's next turn."""
        return self._encode(self._template(messages, tools, add_generation_prompt=True))

    def prompt_of(self, question: str, form: PromptForm) -> list[int]:
        """The tokens before the answer to a question, as training rendered its rows."""
        if form.is_text:
            return self.text_prompt(form.filled(question))
        if self.has_template:
            return self.chat_prompt([Message("user", question, train=False)])
        if form.format == "alpaca":
            return self.text_prompt(as_text(Instruction(question, "", "")).spans[0].text)
        return self.text_prompt(question)

    def stop_ids(self, form: PromptForm) -> set[int]:
        """The tokens that end an answer: the tokenizer's end token, and the one that the chat template trains."""
        ids = {self.tokenizer.eos_token_id}
        if self.has_template and not form.is_text:
            talk = (Message("user", "?", train=False), Message("assistant", "!", train=True))
            with suppress(BadRow, ModelError):  # a template of another kind; its rows say what is wrong with it
                ids.add(self._turn(talk, ())[1][-1])
        return ids

    def text_prompt(self, text: str) -> list[int]:
        """The tokens of a text that is to be continued, with the BOS that the tokenizer puts before it, once."""
        ids = self._encode(text)
        return ids if ids[:1] == self._bos else self._bos + ids

    def _tokens(self, item: Item, train_on: str) -> list[tuple[list[int], list[float]]]:
        """The tokens and weights of each example."""
        item = self._as_rendered(item)
        if isinstance(item, Conversation):
            self._all_is_read(item)
            tokens = self._conversation(CHOOSE[train_on](item.messages), item.tools)
        else:
            tokens = [self._text(item.spans) if isinstance(item, Text) else (list(item.input_ids), list(item.weights))]
        for input_ids, _ in tokens:
            self._one_bos(input_ids)
        return _all_trained(tokens) if train_on == "all" else tokens

    def _side(self, item: Item, side: str, row: RowId) -> Example:
        tokens = self._tokens(item, "answers")
        if len(tokens) > 1:
            what = f"the chat template renders earlier turns anew, so the answers of `{side}` are not one text"
            raise BadRow(what, fix="let the two differ in their last answer alone")
        [(input_ids, weights)] = tokens
        return Example(input_ids, weights, row, side=side)

    def _alone(self, items: Iterable[Item]) -> Iterator[tuple[Item, str]]:
        """Each item that is rendered by itself, and what of it is trained."""
        for item in items:
            if isinstance(item, Preference):
                yield from ((self._as_rendered(side), "answers") for side in (item.chosen, item.rejected))
            else:
                yield self._as_rendered(item), self.train_on

    def _labelled(self, item: Labelled, row: RowId) -> Example:
        if item.label not in self.labels:
            few = ", ".join(f"`{quote(label)}`" for label in list(self.labels)[:SHOWN_LABELS])
            more = ", …" if len(self.labels) > SHOWN_LABELS else ""
            fix = "train on rows with it, or take the row out"
            raise BadRow(f"`{quote(item.label)}` is none of the labels that are learned: {few}{more}", fix=fix)
        encoded = self._with_special_tokens(item)
        whole = len(encoded["input_ids"])
        if self.max_length is not None and whole > self.max_length:
            encoded = self._with_special_tokens(item, truncation=True, max_length=self._room(item))
        input_ids = list(encoded["input_ids"])
        if not input_ids:
            raise BadRow("the tokenizer makes no token of the text")
        segments = tuple(encoded.get("token_type_ids", ()))
        return Example(
            input_ids,
            [0.0] * (len(input_ids) - 1) + [1.0],
            row,
            cut=whole - len(input_ids),
            label=self.labels[item.label],
            segments=segments if any(segments) else None,
        )

    def _with_special_tokens(self, item: Labelled, **cutting: Any) -> Mapping[str, list[int]]:
        return self.tokenizer(item.text, item.pair, return_attention_mask=False, verbose=False, **cutting)

    def _room(self, item: Labelled) -> int:
        special = self.tokenizer.num_special_tokens_to_add(pair=item.pair is not None)
        if self.max_length <= special:
            what = (
                f"`data.max_length: {self.max_length}` leaves no room beside the tokenizer's {special} special tokens"
            )
            raise DataError(Problem(what, fix="raise `data.max_length`"))
        return self.max_length

    def _as_rendered(self, item: Item) -> Item:
        if not isinstance(item, Instruction):
            return item
        return as_conversation(item) if self.has_template else as_text(item)

    def _rendered_together(self, prompts: Mapping[tuple[Hashable, ...], Prompt]) -> dict[Hashable, str]:
        """The prompts as texts, by their keys; without those that are better rendered alone, to see what is wrong."""
        alike: dict[Hashable, list[tuple[Hashable, ...]]] = {}
        for key in prompts:
            alike.setdefault(key[1:], []).append(key)
        found: dict[Hashable, str] = {}
        for keys in (group[i : i + TOGETHER] for group in alike.values() for i in range(0, len(group), TOGETHER)):
            _, tools, asks = prompts[keys[0]]
            talks = [_plain(prompts[key].messages) for key in keys]
            texts = rendered_together(self.tokenizer, talks, tools, add_generation_prompt=asks)
            found |= zip(keys, texts or (), strict=texts is not None)
        return found

    def _all_is_read(self, talk: Conversation) -> None:
        """BadRow for tools, calls or reasoning that the template leaves out: the model would never see them."""
        for key, with_it, without in _with_and_without(talk):
            if self._asked(with_it) == self._asked(without):
                fix = f"use a tokenizer whose template reads `{key}`, or take it out of the rows"
                raise BadRow(f"the chat template leaves `{key}` out", fix=fix)

    def _conversation(self, messages: Sequence[Message], tools: Tools) -> list[tuple[list[int], list[float]]]:
        done: list[tuple[list[int], list[float]]] = []
        input_ids: list[int] = []
        weights: list[float] = []
        for end, message in enumerate(messages, 1):
            if not message.train:
                continue
            prompt, answer, answer_weights = self._turn(messages[:end], tools)
            if prompt[: len(input_ids)] != input_ids:
                done.append((input_ids, weights))
                input_ids, weights = [], []
            scaled = [message.weight * weight for weight in answer_weights]
            weights = weights + [0.0] * (len(prompt) - len(input_ids)) + scaled
            input_ids = prompt + answer
        return [*done, (input_ids, weights)]

    def _turn(self, messages: Sequence[Message], tools: Tools) -> tuple[list[int], list[int], list[float]]:
        """The last message's prompt, its answer up to and with the stop token, and the weights of the answer."""
        if len(messages) == 1:
            raise BadRow("the conversation begins with an answer, so it has no prompt", fix="begin with a user turn")
        before = self._template(messages[:-1], tools, add_generation_prompt=True)
        whole = self._template(messages, tools)
        written = whole[len(before) :] if whole.startswith(before) else self._moved(messages, tools, before, whole)
        prompt = self._encode(before)
        answer = self._continue(prompt, before, before + written)
        stop = self._stop(answer, written, messages[-1])
        weights = self._marked(messages, tools, prompt + answer)[len(prompt) :][:stop] if self.tagged else [1.0] * stop
        if 1.0 not in weights:
            raise ModelError(_marks_nothing(written))
        last = stop - weights[::-1].index(1.0)  # marks may end before the stop token, which is trained in any case
        return prompt, answer[:stop], weights[:last] + [1.0] * (stop - last)

    def _moved(self, messages: Sequence[Message], tools: Tools, before: str, whole: str) -> str:
        """What the template writes for the last turn, where `whole` tells what stands before it in another way.

        It begins where two answers begin to differ. ModelError unless what stands there since the turn before is what
        inference puts there.
        """
        others = [self._template([*messages[:-1], replace(messages[-1], content=said)], tools) for said in ("a", "b")]
        shared = others[0][: _same_start(*others)]
        asked = messages[-2].content.strip()
        since = before[before.rfind(asked) :] if asked and asked in before else before
        if shared in others or not whole.startswith(shared) or not shared.endswith(since):
            raise ModelError(_not_a_prefix(before, whole))
        return whole[len(shared) :]

    def _stop(self, answer: list[int], text: str, message: Message) -> int:
        """The number of tokens up to and with the stop token: the first special one that the template writes after the
        content, behind which only special tokens and white space stand."""
        end = len(answer)
        while end and self._is_silent(answer[end - 1]):
            end -= 1
        special = [place for place in range(end, len(answer)) if answer[place] in self.special]
        said = message.content.strip()
        if said and said in text:
            tail = text.rpartition(said)[2]
            if "tool_calls" not in message.fields:
                self._nothing_behind_the_stop(tail)
            # special tokens that the content itself ends with are no stop tokens
            of_template = sum(id in self.special for id in self._encode(tail))
            special = special[max(0, len(special) - of_template) :]
        if not special:
            raise ModelError(
                Problem(
                    "the chat template ends an answer without a stop token, so the model would never learn to stop",
                    line=quote(text[-60:]),
                    fix="use a tokenizer whose template writes the end token after the assistant's content",
                )
            )
        return special[0] + 1

    def _nothing_behind_the_stop(self, tail: str) -> None:
        """ModelError where text stands behind the first special token after the content, as in templates that always
        ask for the next answer: what ends an answer would be anybody's guess."""
        ids = self._encode(tail)
        first = next((place for place, id in enumerate(ids) if id in self.special), len(ids))
        if not all(map(self._is_silent, ids[first:])):
            raise ModelError(
                Problem(
                    "the chat template writes more behind the stop token of an answer, so what ends an answer is not clear",
                    line=quote(tail),
                    fix="use a tokenizer whose template asks for an answer only where `add_generation_prompt` is true",
                )
            )

    def _is_silent(self, id: int) -> bool:
        """Whether a token is a special one or white space."""
        if id not in self._silent:
            self._silent[id] = id in self.special or not self._decode([id]).strip()
        return self._silent[id]

    def _marked(self, messages: Sequence[Message], tools: Tools, ids: list[int]) -> list[float]:
        """1 for the tokens that the template's `{% generation %}` blocks hold.

        For all of them if the template's tokens are not `ids`, because one was split where prompt and answer meet.
        """
        encoded = tokenized(self.tokenizer, _plain(messages), tools, return_assistant_tokens_mask=True)
        return [float(mark) for mark in encoded["assistant_masks"]] if encoded["input_ids"] == ids else [1.0] * len(ids)

    def _text(self, spans: Sequence[Span]) -> tuple[list[int], list[float]]:
        """The spans one after the other, and an end token if the last one is trained."""
        bos = [] if self._encode(spans[0].text)[:1] == self._bos else self._bos  # the text may bring its own
        text, input_ids, weights = "", list(bos), [0.0] * len(bos)
        for span in spans:
            new = self._continue(input_ids[len(bos) :], text, text + span.text)
            text += span.text
            input_ids += new
            weights += [float(span.train)] * len(new)
        eos = self.tokenizer.eos_token_id
        if spans[-1].train and eos is not None and input_ids[-1:] != [eos]:
            input_ids.append(eos)
            weights.append(1.0)
        weights[:1] = [0.0]  # nothing stands before the first token that could predict it
        return input_ids, weights

    def _continue(self, ids: list[int], before: str, whole: str) -> list[int]:
        """The tokens that follow `ids` (those of `before`) so that together they say `whole`.

        `before` keeps the tokens it has at inference, also where tokenizing `whole` at once would reach over its end.
        """
        at_once = self._encode(whole)
        if at_once[: len(ids)] == ids:
            return at_once[len(ids) :]
        rest = whole[len(before) :]
        for new in (self._encode(rest), self._encode_inside(rest)):
            if self._decode(ids + new) == self._decode(at_once):
                return new
        raise BadRow(
            "prompt and answer meet inside a token", fix="move the white space from the prompt's end to the answer"
        )

    def _encode_inside(self, text: str) -> list[int]:
        """Tokens of a text that stands in a line: SentencePiece would put a space before the first word of a text."""
        newline = self._encode("\n")
        ids = self._encode("\n" + text)
        return ids[len(newline) :] if ids[: len(newline)] == newline else []

    def _one_bos(self, input_ids: list[int]) -> None:
        if self.tokenizer.bos_token_id is not None and input_ids[:2] == [self.tokenizer.bos_token_id] * 2:
            bos = self.tokenizer.bos_token
            raise BadRow(
                f"the row begins with `{bos}` twice", fix=f"take `{bos}` out of the data: it is added by itself"
            )

    def _template(self, messages: Sequence[Message], tools: Tools = (), *, add_generation_prompt: bool = False) -> str:
        return self._asked(Prompt(messages, tools, add_generation_prompt))

    def _asked(self, prompt: Prompt) -> str:
        """What the chat template makes of it."""
        if not self.has_template:
            raise ModelError(
                Problem(
                    "the tokenizer has no chat template, and these rows are conversations",
                    where=quote(str(self.tokenizer.name_or_path)),
                    fix="take the instruct variant of `model.base`, or bring the rows into the format `completion`",
                )
            )
        if foreseen := self._foreseen.get(prompt.key):
            return foreseen
        messages, tools, asks = prompt
        return rendered(self.tokenizer, _plain(messages), tools, add_generation_prompt=asks)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _prompts(talk: Conversation, train_on: str) -> Iterator[Prompt]:
    """What is rendered for each answer, and to see that all is read, as far as it can be known."""
    for _, with_it, without in _with_and_without(talk):
        yield from (with_it, without)
    with suppress(BadRow):  # `render` comes upon it too
        messages = CHOOSE[train_on](talk.messages)
        for end in (end for end, message in enumerate(messages, 1) if message.train and end > 1):
            yield Prompt(messages[: end - 1], talk.tools, True)
            yield Prompt(messages[:end], talk.tools, False)


def _with_and_without(talk: Conversation) -> Iterator[tuple[str, Prompt, Prompt]]:
    """(key, prompt, the same without what stands under the key) for all that a template must not leave out."""
    if talk.tools:
        yield "tools", Prompt(talk.messages, talk.tools, False), Prompt(talk.messages, (), False)
    for end, message in enumerate(talk.messages, 1):
        for key in (key for key in MUST_BE_READ if key in message.fields):
            fields = {name: value for name, value in message.fields.items() if name != key}
            without = [*talk.messages[: end - 1], replace(message, fields=fields)]
            yield key, Prompt(talk.messages[:end], talk.tools, False), Prompt(without, talk.tools, False)


def truncate(example: Example, max_length: int) -> Example:
    """The first `max_length` tokens; `cut` says how many were lost."""
    cut = max(0, len(example.input_ids) - max_length)
    if not cut:
        return example
    return replace(example, input_ids=example.input_ids[:max_length], weights=example.weights[:max_length], cut=cut)


def _only_last(messages: Sequence[Message]) -> list[Message]:
    """The same turns, of which only the last answer is learned. BadRow if that one is not to be learned."""
    last = max(place for place, message in enumerate(messages) if message.role == "assistant")
    if not messages[last].train:
        raise BadRow("`data.train_on: last` trains the last answer, and that has `train: false` or `weight: 0`")
    return [replace(message, train=place == last) for place, message in enumerate(messages)]


def _none_left_out(messages: Sequence[Message]) -> Sequence[Message]:
    if any(message.role == "assistant" and not message.train for message in messages):
        raise BadRow("`data.train_on: all` trains every token, and an answer has `train: false` or `weight: 0`")
    return messages


# `data.train_on` -> the turns of a conversation as they are to be learned
CHOOSE = {"answers": lambda messages: messages, "last": _only_last, "all": _none_left_out}


def _all_trained(tokens: Sequence[tuple[list[int], list[float]]]) -> list[tuple[list[int], list[float]]]:
    """Every token with its weight, or 1 where it has none, but not again what the example before begins with too."""
    found, before = [], list[int]()
    for input_ids, weights in tokens:
        known = max(1, _same_start(before, input_ids))  # nothing stands before the first token that could predict it
        found.append((input_ids, [0.0] * known + [weight or 1.0 for weight in weights[known:]]))
        before = input_ids
    return found


def _same_start(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items both begin with alike."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(a), len(b)))


def as_conversation(item: Instruction) -> Conversation:
    asked = f"{item.instruction}\n\n{item.input}" if item.input else item.instruction
    return Conversation((Message("user", asked, train=False), Message("assistant", item.output, train=True)))


def as_text(item: Instruction) -> Text:
    prompt = ALPACA_WITH_INPUT if item.input else ALPACA
    prompt = prompt.format(instruction=item.instruction, input=item.input)
    return Text((Span(prompt, train=False), Span(item.output, train=True)))


def _plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [message.as_template_reads_it() for message in messages]


def _marks_nothing(answer: str) -> Problem:
    return Problem(
        "the `{% generation %}` blocks of the chat template hold nothing of an answer, so nothing would be trained",
        line=quote(answer),
        fix="put the assistant's content and the end token inside the block",
    )


def _not_a_prefix(before: str, whole: str) -> Problem:
    same = _same_start(before, whole)
    return Problem(
        "the chat template does not begin an answer with its own generation prompt, so training would not see what "
        "inference puts there",
        line=f"prompt: {quote(before[same : same + 30])} · answer: {quote(whole[same : same + 30])}",
        fix="use a tokenizer whose template renders an answer as its generation prompt and what follows",
    )
