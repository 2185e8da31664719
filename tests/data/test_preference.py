"""Preferences: how the columns of TRL's and the hub's sets are read, and that both sides stand behind one prompt."""

import json

import pytest
from templates import CHATML, THINKING, tiny_tokenizer

from lora_cli.data.formats import FORMATS, detect
from lora_cli.data.pipeline import load_examples
from lora_cli.data.render import Renderer
from lora_cli.data.types import (
    BadRow,
    Conversation,
    Instruction,
    Message,
    NothingToLearn,
    Preference,
    RowId,
    Span,
    Text,
)

SYSTEM, ASKED = Message("system", "be brief", train=False), Message("user", "what", train=False)
SAID = Message("assistant", "so", train=False)  # an answer that both sides begin with
ASK, SAY = {"role": "user", "content": "what"}, {"role": "assistant", "content": "so"}
GOOD, BAD = {"role": "assistant", "content": "the cat"}, {"role": "assistant", "content": "the mat"}
SIDES = {"chosen": "the cat", "rejected": "the mat"}
TURNS = {"chosen": [GOOD], "rejected": [BAD]}
WHOLE = {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}


def chats(*before: Message) -> Preference:
    return Preference(*(Conversation((*before, Message("assistant", said, True))) for said in SIDES.values()))


def texts(prompt: str, chosen: str, rejected: str) -> Preference:
    return Preference(*(Text((Span(prompt, train=False), Span(said, train=True))) for said in (chosen, rejected)))


ROWS = {
    "texts behind a prompt": ({"prompt": "what", **SIDES}, texts("what", "the cat", "the mat")),
    "texts behind a question": (
        {"question": "what", **SIDES},
        Preference(Instruction("what", "", "the cat"), Instruction("what", "", "the mat")),
    ),
    "texts behind an instruction and its input": (
        {"instruction": "what", "input": "it", **SIDES},
        Preference(Instruction("what", "it", "the cat"), Instruction("what", "it", "the mat")),
    ),
    "texts behind a system prompt and a question": (
        {"system": "be brief", "question": "what", **SIDES},
        chats(SYSTEM, ASKED),
    ),
    "texts that bring the prompt": (
        {"chosen": "Human: what\n\nAssistant: the cat", "rejected": "Human: what\n\nAssistant: the mat"},
        texts("Human: what\n\nAssistant: the", " cat", " mat"),
    ),
    "a text that goes on where the other ends": (
        {"chosen": "the cat sat", "rejected": "the cat sat down"},
        texts("the cat", " sat", " sat down"),
    ),
    "turns behind turns": ({"prompt": [ASK], **TURNS}, chats(ASKED)),
    "turns behind the text of a prompt": ({"prompt": "what", **TURNS}, chats(ASKED)),
    "turns that bring the prompt": (WHOLE, chats(ASKED)),
    "turns that bring the prompt beside them": ({"prompt": "what", **WHOLE}, chats(ASKED)),
    "turns that bring the turns beside them": ({"prompt": [ASK], **WHOLE}, chats(ASKED)),
    "a system prompt of its own": ({"system": "be brief", **WHOLE}, chats(SYSTEM, ASKED)),
    "answers that both begin with": (
        {"chosen": [ASK, SAY, ASK, GOOD], "rejected": [ASK, SAY, ASK, BAD]},
        chats(ASKED, SAID, ASKED),
    ),
    "one turn each, in ShareGPT's words": (
        {
            "conversations": [{"from": "human", "value": "what"}],
            "chosen": {"from": "gpt", "value": "the cat"},
            "rejected": {"from": "gpt", "value": "the mat"},
        },
        chats(ASKED),
    ),
}
SAME = "`chosen` and `rejected` are the same"
OTHER_PROMPTS = "`chosen` and `rejected` answer different prompts"
BAD_ROWS = [
    ({"prompt": "what", "chosen": "a", "rejected": "a"}, SAME),
    ({"chosen": [ASK, GOOD], "rejected": [ASK, GOOD]}, SAME),
    ({"chosen": "a b", "rejected": "c d"}, "`chosen` and `rejected` begin differently, and there is no prompt"),
    ({"chosen": [{**ASK, "content": "why"}, GOOD], "rejected": [ASK, BAD]}, OTHER_PROMPTS),
    ({"chosen": [GOOD], "rejected": [BAD]}, OTHER_PROMPTS),
    ({"chosen": [ASK, GOOD], "rejected": [ASK, GOOD, ASK, BAD]}, OTHER_PROMPTS),
    ({"chosen": [ASK], "rejected": [ASK, BAD]}, "`chosen` does not end with an answer"),
    ({"prompt": "why", **WHOLE}, "`chosen` has turns before its answer, and none of them is the prompt beside it"),
    ({"prompt": "what", "chosen": "a", "rejected": [BAD]}, "`chosen` is neither text nor a list of turns"),
    ({"prompt": "what", "chosen": [GOOD], "rejected": []}, "`rejected` is neither text nor a list of turns"),
    ({"prompt": "what", "chosen": "a"}, "`chosen` is neither text nor a list of turns"),
    ({"prompt": "what", "chosen": [GOOD]}, "`rejected` is missing"),
    ({"chosen": [ASK, GOOD], "rejected": [ASK, {"role": "bot"}]}, "`rejected[1].role` is `bot`, not a role"),
]


@pytest.mark.parametrize(("row", "expected"), ROWS.values(), ids=ROWS)
def test_two_answers_are_read_behind_the_prompt_that_they_share(row, expected):
    assert detect(row) == "preference"
    assert FORMATS["preference"].parse(row) == expected


@pytest.mark.parametrize(("row", "what"), BAD_ROWS, ids=[str(number) for number in range(len(BAD_ROWS))])
def test_a_row_that_prefers_nothing_says_why(row, what):
    with pytest.raises(BadRow) as error:
        FORMATS["preference"].parse(row)

    assert error.value.what == what


def test_a_pair_with_an_empty_answer_has_nothing_to_learn():
    with pytest.raises(NothingToLearn):
        FORMATS["preference"].parse({"prompt": "what", "chosen": " ", "rejected": "a"})


@pytest.mark.parametrize(("row", "expected"), ROWS.values(), ids=ROWS)
def test_both_sides_are_trained_from_one_place_on_to_the_stop_token(row, expected):
    renderer = Renderer(tiny_tokenizer(CHATML))

    chosen, rejected = renderer.render(expected, RowId("train.jsonl", 1))

    assert (chosen.side, rejected.side) == ("chosen", "rejected")
    start = chosen.prompt_length
    assert start == rejected.prompt_length > 0
    assert chosen.input_ids[:start] == rejected.input_ids[:start]
    for example in (chosen, rejected):
        assert example.weights[start:] == [1.0] * (len(example.input_ids) - start)
        assert example.input_ids[-1] == renderer.tokenizer.eos_token_id
    renderer.foresee([expected])
    assert renderer.render(expected, RowId("train.jsonl", 1)) == [chosen, rejected]


def test_answers_that_the_template_renders_anew_are_no_pair():
    row = {"chosen": [ASK, SAY, ASK, GOOD], "rejected": [ASK, BAD, ASK, GOOD]}
    row = json.loads(json.dumps(row).replace('"so"', '"<think>\\nx\\n</think>\\n\\nso"'))

    with pytest.raises(BadRow, match="renders earlier turns anew"):
        Renderer(tiny_tokenizer(THINKING)).render(FORMATS["preference"].parse(row), RowId("train.jsonl", 1))


def test_a_pair_that_loses_a_side_to_max_length_is_left_out_whole(tmp_path):
    rows = [{"prompt": "what", **SIDES}] * 30 + [{"prompt": "the cat sat on the mat " * 9, **SIDES}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    examples, report = load_examples(
        "train.jsonl", folder=tmp_path, tokenizer=tiny_tokenizer(CHATML), max_length=30, train_on="last"
    )

    assert [example.side for example in examples] == ["chosen", "rejected"] * 30
    assert report.dropped == {"no answer within max_length": 1}
    assert "60 examples, two for a pair" in report.summary()
