import pytest

from lora_cli.data.formats import FORMATS, detect, templated
from lora_cli.data.types import BadRow, Conversation, Instruction, Labelled, Message, NothingToLearn, Span, Text, Tokens

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
    (
        "messages",
        {
            "messages": [
                TURNS[0],
                {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "name": None},
                {"role": "tool", "content": "3", "tool_call_id": "a"},
                {**TURNS[1], "reasoning_content": "so"},
            ],
            "tools": '[{"name": "f"}]',
        },
        Conversation(
            (
                ASKED,
                Message("assistant", "", train=True, fields={"tool_calls": [{"name": "f"}]}),
                Message("tool", "3", train=False, fields={"tool_call_id": "a"}),
                Message("assistant", "that", train=True, fields={"reasoning_content": "so"}),
            ),
            tools=({"name": "f"},),
        ),
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
    ("tokens", {"input_ids": [5, 6, 7], "text": "the cat"}, Tokens((5, 6, 7), (0.0, 1.0, 1.0))),
    ("tokens", {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, Tokens((5, 6, 7), (0.0, 0.0, 1.0))),
    ("tokens", {"input_ids": [5, 6], "labels": [5, 6], "attention_mask": [1, 1]}, Tokens((5, 6), (0.0, 1.0))),
    (
        "messages",
        {"messages": [*TURNS, TURNS[0], {**TURNS[1], "weight": 0.5}]},
        Conversation((ASKED, ANSWERED, ASKED, Message("assistant", "that", train=True, weight=0.5))),
    ),
    (
        "messages",
        {"messages": [*TURNS, {**TURNS[0], "weight": 0}, {**TURNS[1], "weight": 0, "content": ""}]},
        Conversation((ASKED, ANSWERED, ASKED, Message("assistant", "", train=False))),
    ),
]
LABELLED_ROWS = [
    ({"text": "what", "label": "that"}, Labelled("what", "that")),
    ({"text": "what", "label": 3, "text_pair": "so"}, Labelled("what", "3", "so")),
    ({"text": "what", "label": "0", "text_pair": None}, Labelled("what", "0")),
]


@pytest.mark.parametrize(("name", "row", "expected"), ROWS)
def test_a_row_is_found_and_read(name, row, expected):
    assert detect(row) == name
    assert FORMATS[name].parse(row) == expected


@pytest.mark.parametrize(("row", "expected"), LABELLED_ROWS)
def test_a_labelled_row_is_read_where_it_is_asked_for_and_is_a_text_elsewhere(row, expected):
    assert FORMATS["labelled"].parse(row) == expected
    assert detect(row) == "text"


def test_every_format_is_tested():
    assert {name for name, _, _ in ROWS} | {"labelled", "preference"} == set(FORMATS)


@pytest.mark.parametrize(
    "columns",
    [[], ["prompt"], ["prompt", "response", "output"], ["prompt", "chosen"], ["question", "answer"]],
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
    ("messages", {"messages": TURNS, "tools": [3]}, "`tools` is not a list of JSON schemas"),
    ("messages", {"messages": TURNS, "tools": "["}, "`tools` is not JSON: Expecting value: line 1 column 2 (char 1)"),
    ("messages", turn(function_call={}), "`messages[1].function_call` cannot be read yet"),
    ("messages", turn(content=None), "`messages[1].content` is missing"),
    ("messages", turn(content=[{"type": "text"}]), "`messages[1].content` is not text: [{'type': 'text'}]"),
    ("messages", turn(role="narr\x1bator"), "`messages[1].role` is `narr\\x1bator`, not a role"),
    ("messages", turn(train="no"), "`messages[1].train` is for assistant turns, and true or false"),
    ("messages", turn(train=False), "every assistant turn of `messages` has `train: false` or `weight: 0`"),
    ("messages", turn(weight=0), "every assistant turn of `messages` has `train: false` or `weight: 0`"),
    ("messages", turn(weight=-1), "`messages[1].weight` is for assistant turns, and a number from 0 on"),
    ("messages", turn(weight=True), "`messages[1].weight` is for assistant turns, and a number from 0 on"),
    (
        "messages",
        {"messages": [{**TURNS[0], "weight": 1}, TURNS[1]]},
        "`messages[0].weight` is for assistant turns, and a number from 0 on",
    ),
    ("tokens", {"input_ids": "5 6"}, "`input_ids` is not a list of whole numbers"),
    ("tokens", {"input_ids": [5, True]}, "`input_ids` is not a list of whole numbers"),
    ("tokens", {"input_ids": [5, -1]}, "`input_ids[1]` is -1, not a token"),
    ("tokens", {"input_ids": [5, 6], "labels": [5]}, "`labels` has 1 entries, and `input_ids` 2"),
    ("tokens", {"input_ids": [5, 6, 7], "labels": [6, 7, -100]}, "`labels[0]` is 6, and the token there is 5"),
    ("tokens", {"input_ids": [5, 6], "attention_mask": [1, 0]}, "`attention_mask` says that the row is padded"),
    (
        "messages",
        {"messages": [{**TURNS[0], "train": True}, TURNS[1]]},
        "`messages[0].train` is for assistant turns, and true or false",
    ),
    ("labelled", {"text": "what"}, "`label` is missing"),
    ("labelled", {"text": "what", "label": 0.5}, "`label` is no word and no whole number: 0.5"),
    ("labelled", {"text": "what", "label": True}, "`label` is no word and no whole number: True"),
    ("labelled", {"text": "what", "label": " "}, "`label` is no word and no whole number:  "),
    ("labelled", {"label": "that"}, "`text` is missing"),
    ("labelled", {"text": "what", "label": "that", "text_pair": 3}, "`text_pair` is not text: 3"),
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
        ("labelled", {"text": " ", "label": "that"}, "`text` is empty"),
        ("messages", turn(content=""), "`messages[1].content` is an empty answer"),
        ("tokens", {"input_ids": [5]}, "no token has a label"),
        ("tokens", {"input_ids": [5, 6], "labels": [5, -100]}, "no token has a label"),
    ],
)
def test_a_row_with_an_empty_answer_has_nothing_to_learn(name, row, what):
    with pytest.raises(NothingToLearn) as error:
        FORMATS[name].parse(row)

    assert error.value.what == what


def test_a_template_is_filled_with_columns_and_trains_what_is_marked():
    format = templated("Q: {question}\nA: [[{answer} {{{n}}}]]\nWhy? [[{why}]]\n")

    found = format.parse({"question": "what", "answer": "that", "n": 3, "why": "so", "other": 1})

    spans = [Span("Q: what\nA: ", False), Span("that {3}", True), Span("\nWhy? ", False), Span("so", True)]
    assert found == Text(tuple(spans))
    assert format.needs == (("question",), ("answer",), ("n",), ("why",))


def test_text_of_a_row_is_no_template():
    found = templated("{question} [[{answer}]]").parse({"question": "[[{answer}]]", "answer": "{question}"})

    assert found == Text((Span("[[{answer}]] ", False), Span("{question}", True)))


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"question": "what"}, "`answer` is missing"),
        ({"question": "what", "answer": ["that"]}, "`answer` is not text: ['that']"),
        ({"question": "what", "answer": " "}, "`answer` is empty"),
    ],
)
def test_a_row_that_does_not_fill_a_template_says_why(row, what):
    with pytest.raises(BadRow) as error:
        templated("{question} [[{answer}]]").parse(row)

    assert error.value.what == what
