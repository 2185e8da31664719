"""Prompts asked through `data.template`, up to what is trained."""

import pytest

from lora_cli.recipe.template import how_to_ask, prompt_text

ONE = "Q: {question}\nA: [[{answer}]]"
TWO = "{context}\nQ: {question} ({context})\nA: [[{answer}]]"
ASKED = [
    (ONE, "why?", "Q: why?\nA: "),
    (ONE, '{"question": "why?"}', "Q: why?\nA: "),
    (ONE, '{"other": 1}', 'Q: {"other": 1}\nA: '),
    (ONE, '{"question": null}', 'Q: {"question": null}\nA: '),
    (TWO, '{"question": "why?", "context": 7}', "7\nQ: why? (7)\nA: "),
    ("A poem:\n[[{poem}]]", "The cat", "A poem:\nThe cat"),
    ("[[{text}]]", "The cat", "The cat"),
    ("[[{text}]]", "{}", "{}"),
    ("{{{question}}} [[{answer}]]", "why?", "{why?} "),
]


@pytest.mark.parametrize(("template", "prompt", "text"), ASKED)
def test_a_prompt_stands_where_the_rows_have_theirs(template, prompt, text):
    assert prompt_text(template, prompt) == text


@pytest.mark.parametrize("prompt", ["why?", '{"question": "why?"}', '{"question": "a", "context": []}', "[" * 100_000])
def test_a_prompt_that_does_not_give_every_field_is_told_how(prompt):
    with pytest.raises(ValueError, match=r"^`data.template` asks with 2 fields, and this prompt does not give them$"):
        prompt_text(TWO, prompt)

    assert how_to_ask(TWO) == 'give a text for each field, as JSON: {"context": "…", "question": "…"}'
