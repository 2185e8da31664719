import pytest

from lora_cli.data.formats import FORMATS, detect
from lora_cli.data.types import BadRow, Conversation, Instruction, Message, NothingToLearn, Span, Text

ASKED, ANSWERED = Message("user", "what", train=False), Message("assistant", "that", train=True)
SYSTEM = Message("system", "be brief", train=False)
TURNS = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "that"}]
SAID = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "that"}]
PAIR = Text((Span("what", train=False), Span("that", train=True)))

ROWS = [
    ("messages", {"messages": TURNS}, Conversation((ASKED, ANSWERED))),
    ("messages", {"messages": TURNS, "system": "be brief", "id": 3}, Conversation((SYSTEM, ASKED, ANSWERED))),
    (
        "messages",
        {"messages": [{"role": "system", "content": "be brief"}, *TURNS]},
        Conversation((SYSTEM, ASKED, ANSWERED)),
    ),
    (
        "messages",
        {
            "messages": [
                *TURNS,
                {"role": "tool", "content": "3"},
                {"role": "assistant", "content": "so", "train": False},
            ]
        },
        Conversation((ASKED, ANSWERED, Message("tool", "3", train=False), Message("assistant", "so", train=False))),
    ),
    ("sharegpt", {"conversations": SAID}, Conversation((ASKED, ANSWERED))),
    (
        "sharegpt",
        {"conversations": [{"from": "user", "value": "what"}, {"from": "assistant", "value": "that"}]},
        Conversation((ASKED, ANSWERED)),
    ),
    ("sharegpt", {"conversations": SAID, "system": "be brief"}, Conversation((SYSTEM, ASKED, ANSWERED))),
    ("alpaca", {"instruction": "what", "input": "it", "output": "that"}, Instruction("what", "it", "that")),
    ("alpaca", {"instruction": "what", "output": "that", "text": "all"}, Instruction("what", "", "that")),
    ("alpaca", {"instruction": "what", "input": None, "output": "that"}, Instruction("what", "", "that")),
    ("completion", {"prompt": "what", "completion": "that"}, PAIR),
    ("completion", {"prompt": "what", "response": "that"}, PAIR),
    ("completion", {"prompt": "what", "output": "that"}, PAIR),
    ("completion", {"prompt": "what", "completion": "that", "output": "other"}, PAIR),
    ("text", {"text": "the cat"}, Text((Span("the cat", train=True),))),
]


@pytest.mark.parametrize(("name", "row", "expected"), ROWS)
def test_a_row_is_found_and_read(name, row, expected):
    assert detect(row) == name
    assert FORMATS[name].parse(row) == expected


def test_every_format_is_tested():
    assert {name for name, _, _ in ROWS} == set(FORMATS)


@pytest.mark.parametrize(
    "columns",
    [[], ["prompt"], ["prompt", "response", "output"], ["prompt", "chosen", "rejected"], ["question", "answer"]],
)
def test_columns_that_fit_no_format_or_two_ways_are_not_guessed(columns):
    assert detect(columns) is None


def turn(**changed):
    return {"messages": [TURNS[0], {**TURNS[1], **changed}]}


BAD_ROWS = [
    ("alpaca", {"instruction": "what"}, "`output` is missing"),
    ("alpaca", {"instruction": "what", "output": 3}, "`output` is not text: 3"),
    ("alpaca", {"instruction": "what", "input": [], "output": "that"}, "`input` is not text: []"),
    ("completion", {"completion": "that"}, "`prompt` is missing"),
    ("completion", {"prompt": "what"}, "`completion` is missing"),
    ("text", {"text": None}, "`text` is missing"),
    ("messages", {}, "`messages` is missing"),
    ("messages", {"messages": "what"}, "`messages` is not a list of turns"),
    ("messages", {"messages": []}, "`messages` is not a list of turns"),
    ("messages", {"messages": ["what"]}, "`messages[0]` is not an object with `role` and `content`"),
    ("messages", {"messages": TURNS[:1]}, "`messages` has no assistant turn"),
    ("messages", {"messages": TURNS, "tools": [{}]}, "`tools` cannot be read yet"),
    ("messages", turn(content=None), "`messages[1].content` is missing"),
    ("messages", turn(content=[{"type": "text"}]), "`messages[1].content` is not text: [{'type': 'text'}]"),
    ("messages", turn(role="narr\x1bator"), "`messages[1].role` is `narr\\x1bator`, not a role"),
    ("messages", turn(tool_calls=[{}]), "`messages[1].tool_calls` cannot be read yet"),
    ("messages", turn(reasoning_content="so"), "`messages[1].reasoning_content` cannot be read yet"),
    ("messages", turn(train="no"), "`messages[1].train` is for assistant turns, and true or false"),
    ("messages", turn(train=False), "every assistant turn of `messages` has `train: false`"),
    (
        "messages",
        {"messages": [{**TURNS[0], "train": True}, TURNS[1]]},
        "`messages[0].train` is for assistant turns, and true or false",
    ),
    ("sharegpt", {"conversations": [{"from": "human"}]}, "`conversations[0].value` is missing"),
    ("sharegpt", {"conversations": SAID[:1]}, "`conversations` has no assistant turn"),
]


@pytest.mark.parametrize(("name", "row", "what"), BAD_ROWS)
def test_a_row_that_does_not_fit_says_why(name, row, what):
    with pytest.raises(BadRow) as error:
        FORMATS[name].parse(row)

    assert error.value.what == what
    assert not isinstance(error.value, NothingToLearn)


@pytest.mark.parametrize(
    ("name", "row", "what"),
    [
        ("alpaca", {"instruction": "what", "output": " \n"}, "`output` is empty"),
        ("completion", {"prompt": "what", "response": ""}, "`response` is empty"),
        ("text", {"text": ""}, "`text` is empty"),
        ("messages", turn(content=""), "`messages[1].content` is an empty answer"),
    ],
)
def test_a_row_with_an_empty_answer_has_nothing_to_learn(name, row, what):
    with pytest.raises(NothingToLearn) as error:
        FORMATS[name].parse(row)

    assert error.value.what == what
