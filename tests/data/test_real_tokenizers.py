"""Masks on the tokenizers and templates that people train with. Those that are not here are skipped:
`python scripts/real_tokenizers.py` fetches them."""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from templates import mixtures

from lora_cli.data.encoder import Encoder
from lora_cli.data.render import Renderer, truncate
from lora_cli.data.types import BadRow, Conversation, Example, Message, PromptForm, RowId, Span, Text
from lora_cli.models.gguf import converted_folder
from lora_cli.models.load import load_tokenizer

pytestmark = pytest.mark.real

HOME = Path(__file__).parents[2] / "models" / "tokenizers"
ROW = RowId("train.jsonl", 1)
CALL = {"type": "function", "id": "a1b2c3d4e", "function": {"name": "look", "arguments": {"at": "the mat"}}}
TOOL = {"type": "function", "function": {"name": "look", "description": "look", "parameters": {"type": "object"}}}


@dataclass(frozen=True)
class Real:
    """What a family's template does: what ends a turn, how many BOS it writes, and what it has no place for."""

    stop: str
    bos: int
    refuses: tuple[str, ...] = ()
    opens: str = ""  # what it puts before an answer that has no reasoning


FAMILIES = {
    "smollm2": Real("<|im_end|>", 1, refuses=("tools", "reasoning")),
    "qwen3": Real("<|im_end|>", 0, opens="<think>\n\n</think>\n\n"),
    "llama3": Real("<|eot_id|>", 1, refuses=("tools", "reasoning")),
    "gemma3": Real("<end_of_turn>", 1, refuses=("tools", "reasoning")),
    "mistral": Real("</s>", 1, refuses=("system", "tools", "reasoning")),
    "mistral-nemo": Real("</s>", 1, refuses=("reasoning",)),
    "phi3": Real("<|end|>", 0, refuses=("tools", "reasoning")),
}


def user(text: str) -> Message:
    return Message("user", text, train=False)


def said(text: str, **fields) -> Message:
    return Message("assistant", text, train=True, fields=fields)


SYSTEM = Message("system", "Be brief.", train=False)
TALKS = {
    "one answer": Conversation((user("What is a kludge?"), said("A clumsy fix."))),
    "several": Conversation((user("One?"), said("Yes."), user("Two?"), said("No."), user("数 é 🙂?"), said("答 🙂"))),
    "line ends": Conversation((user("One\n\n"), said("\n\nYes.\n"), user(" two"), said("  indented\n\tcode"))),
    "system": Conversation((SYSTEM, user("One?"), said("Yes."), user("Two?"), said("No."))),
    "tools": Conversation(
        (
            user("Where is it?"),
            said("", tool_calls=[CALL]),
            Message("tool", "on the mat", train=False, fields={"tool_call_id": CALL["id"]}),
            said("On the mat."),
        ),
        tools=(TOOL,),
    ),
    "reasoning": Conversation(
        (user("One?"), said("Yes.", reasoning_content="one"), user("Two?"), said("No.", reasoning_content="two"))
    ),
}
EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)
EACH_TALK = pytest.mark.parametrize(
    ("family", "talk"),
    [(family, talk) for family, real in FAMILIES.items() for talk in TALKS if talk not in real.refuses],
)


@pytest.fixture
def tokenizer(family, request):
    if family == "smollm2":
        return loaded(converted_folder(request.getfixturevalue("smollm2_gguf")))
    if not (HOME / family / "tokenizer_config.json").is_file():
        pytest.skip(f"no tokenizer in {HOME / family}")
    return loaded(HOME / family)


loaded = cache(load_tokenizer)


def runs_of(example: Example) -> list[tuple[int, int]]:
    """Where what is trained begins and ends."""
    edges = [0, *(int(weight > 0) for weight in example.weights), 0]
    changes = [place for place, (a, b) in enumerate(pairwise(edges)) if a != b]
    return list(zip(changes[::2], changes[1::2], strict=True))


def answers_of(tokenizer, talk: Conversation, train_on: str = "answers") -> list[tuple[list[int], list[int]]]:
    """(the tokens before it, its own) of each trained run."""
    examples = Renderer(tokenizer, train_on).render(talk, ROW)
    return [(e.input_ids[:start], e.input_ids[start:end]) for e in examples for start, end in runs_of(e)]


def prompts_of_inference(tokenizer, talk: Conversation) -> list[list[int]]:
    plain = [message.as_template_reads_it() for message in talk.messages]
    asked = [place for place, message in enumerate(talk.messages) if message.train]
    tools = list(talk.tools) or None
    ask = tokenizer.apply_chat_template
    return [ask(plain[:place], tools=tools, add_generation_prompt=True)["input_ids"] for place in asked]


@EACH_FAMILY
def test_a_text_has_the_tokens_that_the_tokenizer_gives_it_at_once(tokenizer):
    encode, texts = Encoder(tokenizer), mixtures(tokenizer, count=400)

    encode.foresee(texts[:200])

    assert [encode(text) for text in texts] == tokenizer(texts, add_special_tokens=False)["input_ids"]


@EACH_TALK
def test_each_answer_is_trained_behind_the_prompt_of_inference_up_to_its_stop_token(tokenizer, family, talk):
    stop = tokenizer.convert_tokens_to_ids(FAMILIES[family].stop)
    found = answers_of(tokenizer, TALKS[talk])

    assert [before for before, _ in found] == prompts_of_inference(tokenizer, TALKS[talk])
    for (_, answer), message in zip(found, (m for m in TALKS[talk].messages if m.train), strict=True):
        assert answer[-1] == stop
        assert answer.count(stop) == 1
        text = tokenizer.decode(answer[:-1]).strip()
        assert text.endswith(message.content.strip())
        assert message.content.strip() or "look" in text
        assert message.fields.get("reasoning_content", "") in text


@EACH_FAMILY
def test_nothing_but_the_answer_and_its_stop_token_is_trained(tokenizer, family):
    [(_, answer)] = answers_of(tokenizer, TALKS["one answer"])

    assert tokenizer.decode(answer) == FAMILIES[family].opens + "A clumsy fix." + FAMILIES[family].stop


@EACH_TALK
def test_a_conversation_has_the_bos_of_its_template_and_never_two(tokenizer, family, talk):
    for example in Renderer(tokenizer).render(TALKS[talk], ROW):
        ids, bos = example.input_ids, tokenizer.bos_token_id
        if family != "smollm2":  # whose BOS opens every turn
            assert ids.count(bos) == FAMILIES[family].bos
        assert ids[:2] != [bos, bos]
        assert (ids[0] == bos) == bool(FAMILIES[family].bos)


@pytest.mark.parametrize(("family", "talk"), [(name, talk) for name, real in FAMILIES.items() for talk in real.refuses])
def test_what_a_template_has_no_place_for_is_refused(tokenizer, family, talk):
    with pytest.raises(BadRow, match=r"the chat template (leaves `.*` out|refuses it: )"):
        Renderer(tokenizer).render(TALKS[talk], ROW)


@EACH_TALK
def test_train_on_last_trains_the_last_answer_alone(tokenizer, family, talk):
    assert answers_of(tokenizer, TALKS[talk], "last") == answers_of(tokenizer, TALKS[talk])[-1:]


@EACH_TALK
def test_train_on_all_trains_each_token_of_the_same_examples_once(tokenizer, family, talk):
    examples = Renderer(tokenizer, "all").render(TALKS[talk], ROW)

    assert [e.input_ids for e in examples] == [e.input_ids for e in Renderer(tokenizer).render(TALKS[talk], ROW)]
    assert examples[0].weights == [0.0] + [1.0] * (len(examples[0].input_ids) - 1)
    for before, after in pairwise(examples):
        [(start, end)] = runs_of(after)
        assert after.input_ids[:start] == before.input_ids[:start]
        assert after.input_ids[start] != before.input_ids[start]
        assert end == len(after.input_ids)


@EACH_FAMILY
def test_truncation_leaves_a_beginning_of_the_same_tokens_and_weights(tokenizer, family):
    [example, *_] = Renderer(tokenizer).render(TALKS["several"], ROW)

    for most in range(2, len(example.input_ids)):
        short = truncate(example, most)
        assert (short.input_ids, short.weights) == (example.input_ids[:most], example.weights[:most])
        assert short.cut == len(example.input_ids) - most


@EACH_FAMILY
def test_a_document_has_one_bos_where_the_tokenizer_puts_one_and_a_trained_end_token(tokenizer, family):
    [example] = Renderer(tokenizer).render(Text((Span("It sat on the mat.", True),)), ROW)

    own = tokenizer("It sat on the mat.")["input_ids"]
    assert example.input_ids == [*own, tokenizer.eos_token_id]
    assert example.weights == [0.0] + [1.0] * len(own)


@EACH_FAMILY
def test_generation_stops_where_training_taught_it_to(tokenizer, family):
    stop = tokenizer.convert_tokens_to_ids(FAMILIES[family].stop)

    assert Renderer(tokenizer).stop_ids(PromptForm("messages")) == {tokenizer.eos_token_id, stop}
    assert Renderer(tokenizer).stop_ids(PromptForm("completion")) == {tokenizer.eos_token_id}
