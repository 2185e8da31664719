from itertools import pairwise

import pytest
from templates import (
    CHATML,
    FAMILIES,
    GEMMA,
    GPT2_WORDS,
    LLAMA3,
    LLAMA3_WORDS,
    MISTRAL,
    PHI,
    THINKING,
    Family,
    space_before_words,
    tiny_tokenizer,
)

from lora_cli.data.chat_template import rendered, rendered_together
from lora_cli.data.formats import templated
from lora_cli.data.render import Renderer, truncate
from lora_cli.data.types import (
    BadRow,
    Conversation,
    Example,
    Instruction,
    Message,
    PromptForm,
    RowId,
    Span,
    Text,
    Tokens,
)
from lora_cli.errors import ModelError
from lora_cli.models.gguf import converted_folder
from lora_cli.models.load import load_tokenizer

ROW = RowId("train.jsonl", 1)
TASK = Instruction("what is that", "the mat", "the cat")


def talk(*contents: str, learned: tuple[bool, ...] | None = None) -> Conversation:
    """User and assistant in turn."""
    learned = learned or (True,) * len(contents)
    return Conversation(
        tuple(
            Message("assistant" if place % 2 else "user", content, bool(place % 2) and learned[place])
            for place, content in enumerate(contents)
        )
    )


CONVERSATIONS = {
    "one answer": talk("what is that", "the cat"),
    "three answers": talk("what", "yes", "why", "no", "what is the answer", "the mat é 猫"),
    "answers that begin with line ends": talk("what", "\n\nyes", "why", "\nno"),
    "prompts that end with line ends": talk("what\n\n", "yes\n", "why\n", "no"),
    "an answer that ends like a turn": talk("what", "yes</s>", "why", "no<|eot_id|>"),
    "answers with reasoning": talk("what", "<think>\nthat\n</think>\n\nyes", "why", "<think>\nit\n</think>\n\nno"),
    "an answer twice": talk("yes", "yes", "yes", "yes"),
}
EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
EACH_CONVERSATION = pytest.mark.parametrize("talked", CONVERSATIONS.values(), ids=CONVERSATIONS)


@pytest.fixture
def smollm2(smollm2_gguf):
    """Its tokenizer, from the folder that the file is converted to."""
    return load_tokenizer(converted_folder(smollm2_gguf))


def inference_prompts(tokenizer, talked: Conversation) -> list[list[int]]:
    """What stands before each learned answer when the model is asked for it."""
    plain = [{"role": message.role, "content": message.content} for message in talked.messages]
    return [
        tokenizer.apply_chat_template(plain[:place], add_generation_prompt=True)["input_ids"]
        for place, message in enumerate(talked.messages)
        if message.train
    ]


def learned_runs(example: Example) -> list[tuple[int, int]]:
    edges = [0, *(int(weight > 0) for weight in example.weights), 0]
    changes = [place for place, (a, b) in enumerate(pairwise(edges)) if a != b]
    return list(zip(changes[::2], changes[1::2], strict=True))


def assert_trained_as_asked(tokenizer, talked: Conversation, stop: str) -> None:
    examples = Renderer(tokenizer).render(talked, ROW)
    runs = [(example, start, end) for example in examples for start, end in learned_runs(example)]

    assert [example.input_ids[:start] for example, start, _ in runs] == inference_prompts(tokenizer, talked)
    answers = [message.content for message in talked.messages if message.train]
    for (example, start, end), answer in zip(runs, answers, strict=True):
        said = tokenizer.decode(example.input_ids[start:end])
        assert said.rstrip().endswith(stop)
        assert said.removesuffix(stop).strip().endswith(answer.strip())
        assert example.input_ids[end - 1] == tokenizer.convert_tokens_to_ids(stop)


@EACH_CONVERSATION
@EACH_FAMILY
@pytest.mark.parametrize("words", [LLAMA3_WORDS, GPT2_WORDS], ids=["llama3 words", "gpt2 words"])
def test_each_answer_is_trained_behind_its_inference_prompt_up_to_its_stop_token(family, talked, words):
    assert_trained_as_asked(tiny_tokenizer(family, words=words), talked, family.stop)


@EACH_CONVERSATION
def test_each_answer_is_trained_behind_its_inference_prompt_where_a_space_stands_before_words(talked):
    assert_trained_as_asked(space_before_words(MISTRAL.template), talked, "</s>")


@pytest.mark.real
@EACH_CONVERSATION
def test_each_answer_is_trained_behind_its_inference_prompt_on_smollm2(smollm2, talked):
    assert smollm2.pad_token_id == smollm2.eos_token_id
    assert_trained_as_asked(smollm2, talked, "<|im_end|>")


@EACH_CONVERSATION
@EACH_FAMILY
def test_a_conversation_has_one_bos_if_the_family_has_one(family, talked):
    tokenizer = tiny_tokenizer(family)

    for example in Renderer(tokenizer).render(talked, ROW):
        assert example.input_ids.count(tokenizer.bos_token_id) == (family.bos is not None)
        assert example.weights[0] == 0


def test_a_system_turn_is_read_and_not_trained():
    tokenizer = tiny_tokenizer(CHATML)
    talked = Conversation((Message("system", "the mat", False), *talk("what", "yes").messages))

    [example] = Renderer(tokenizer).render(talked, ROW)

    assert tokenizer.decode(example.input_ids) == (
        "<|im_start|>system\nthe mat<|im_end|>\n<|im_start|>user\nwhat<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    )
    assert learned_runs(example) == [(len(example.input_ids) - 2, len(example.input_ids))]


def test_a_turn_that_says_train_false_is_read_and_not_trained():
    tokenizer = tiny_tokenizer(CHATML)
    talked = talk("what", "yes", "why", "no", learned=(False, False, False, True))

    [example] = Renderer(tokenizer).render(talked, ROW)

    assert "yes" in tokenizer.decode(example.input_ids[: example.prompt_length])
    assert tokenizer.decode(example.input_ids[example.prompt_length :]) == "no<|im_end|>"


@pytest.mark.parametrize("family", [CHATML, LLAMA3, GEMMA, PHI])
def test_a_template_that_keeps_what_it_rendered_makes_one_example(family):
    assert len(Renderer(tiny_tokenizer(family)).render(CONVERSATIONS["three answers"], ROW)) == 1


def test_a_template_that_drops_earlier_reasoning_makes_an_example_an_answer():
    tokenizer = tiny_tokenizer(THINKING)

    first, second = Renderer(tokenizer).render(CONVERSATIONS["answers with reasoning"], ROW)

    assert tokenizer.decode(first.input_ids[first.prompt_length :]) == "<think>\nthat\n</think>\n\nyes<|im_end|>"
    assert "that" not in tokenizer.decode(second.input_ids)
    assert tokenizer.decode(second.input_ids[second.prompt_length :]) == "<think>\nit\n</think>\n\nno<|im_end|>"


# Like Mistral Nemo's: the system text stands in the last user turn, and is gone once that is answered
MOVING = (
    "{% set system = messages[0].content if messages[0].role == 'system' %}"
    "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if loop.last and m.role == 'user' and system %}{{ system + '\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_moves_the_system_text_has_it_in_each_prompt_as_inference_has():
    tokenizer = tiny_tokenizer(CHATML, template=MOVING)
    talked = Conversation((Message("system", "the mat", False), *talk("what", "yes", "why", "no").messages))

    assert_trained_as_asked(tokenizer, talked, CHATML.stop)
    first, second = Renderer(tokenizer).render(talked, ROW)
    assert tokenizer.decode(first.input_ids).startswith("<|im_start|>user\nthe mat\n\nwhat<|im_end|>")
    assert "the mat\n\nwhy" in tokenizer.decode(second.input_ids)


def test_generation_blocks_choose_what_of_an_answer_is_trained_and_the_stop_token_always_is():
    template = CHATML.template.replace(
        "+ m.content + '<|im_end|>\n' }}",
        "}}{% if m.role == 'assistant' %}the:\n{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}",
    )
    tokenizer = tiny_tokenizer(CHATML, template=template)

    [example] = Renderer(tokenizer).render(talk("what", "yes", "why", "no"), ROW)

    trained = [tokenizer.decode(example.input_ids[start:end]) for start, end in learned_runs(example)]
    assert trained == ["yes<|im_end|>", "no<|im_end|>"]
    assert tokenizer.decode(example.input_ids).endswith("assistant\nthe:\nno<|im_end|>")


BROKEN_TEMPLATES = {
    "the tokenizer has no chat template, and these rows are conversations": None,
    "the chat template ends an answer without a stop token, so the model would never learn to stop": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
    "the chat template does not begin an answer with its own generation prompt, so training would not see what "
    "inference puts there": CHATML.template.replace("assistant\n", "assistant\n<think>\n"),
    "the chat template writes more behind the stop token of an answer, so what ends an answer is not clear": (
        CHATML.template.replace("{% if add_generation_prompt %}", "{% if true %}")
    ),
    "the `{% generation %}` blocks of the chat template hold nothing of an answer, so nothing would be trained": (
        CHATML.template.replace(" + m.role + ", "}}{% generation %}{{ m.role }}{% endgeneration %}{{ ")
    ),
}


@pytest.mark.parametrize(("what", "template"), BROKEN_TEMPLATES.items())
def test_a_template_that_cannot_be_trained_on_is_a_model_error(what, template):
    with pytest.raises(ModelError) as error:
        Renderer(tiny_tokenizer(CHATML, template=template)).render(talk("what", "yes"), ROW)

    assert error.value.problems[0].what == what
    assert error.value.problems[0].fix


NO_SYSTEM = "the chat template refuses it: no system role"
BAD_ROWS = {
    "the conversation begins with an answer, so it has no prompt": (CHATML, talk("", "yes").messages[1:]),
    NO_SYSTEM: (
        GEMMA,
        (Message("system", "the mat", False), *talk("what", "yes").messages),
    ),
}


@pytest.mark.parametrize(("what", "case"), BAD_ROWS.items())
def test_a_row_that_the_template_cannot_render_is_a_bad_row(what, case):
    family, messages = case

    with pytest.raises(BadRow) as error:
        Renderer(tiny_tokenizer(family)).render(Conversation(messages), ROW)

    assert error.value.what == what


def test_a_template_that_writes_bos_twice_makes_a_bad_row():
    doubled = Family("{{ bos_token }}" + LLAMA3.template, LLAMA3.stop, LLAMA3.bos, LLAMA3.eos, LLAMA3.adds_bos)

    with pytest.raises(BadRow, match=r"begins with `<.begin_of_text.>` twice"):
        Renderer(tiny_tokenizer(doubled)).render(talk("what", "yes"), ROW)


COMPLETIONS = {
    "plain": ("what is that", " the cat"),
    "a border inside a token": ("what is the answer: ", "yes"),
    "line ends on both sides": ("question\n", "\nyes"),
    "no prompt": ("", "the cat"),
}


@pytest.mark.parametrize(("prompt", "answer"), COMPLETIONS.values(), ids=COMPLETIONS)
@pytest.mark.parametrize(
    "tokenizer", [tiny_tokenizer(CHATML), tiny_tokenizer(LLAMA3), space_before_words()], ids=["bare", "bos", "space"]
)
def test_a_completion_is_trained_behind_the_prompt_of_inference_up_to_the_end_token(tokenizer, prompt, answer):
    renderer = Renderer(tokenizer)

    [example] = renderer.render(Text((Span(prompt, False), Span(answer, True))), ROW)

    start = len(tokenizer(prompt)["input_ids"])
    assert example.input_ids[:start] == tokenizer(prompt)["input_ids"] == renderer.text_prompt(prompt)
    assert example.weights == [0.0] * max(start, 1) + [1.0] * (len(example.input_ids) - max(start, 1))
    assert example.input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(example.input_ids, skip_special_tokens=True) == prompt + answer


@pytest.mark.parametrize("written", ["the cat", "<|begin_of_text|>the cat", "the cat<|eot_id|>"])
def test_a_document_has_one_bos_and_one_end_token_and_is_trained_as_a_whole(written):
    tokenizer = tiny_tokenizer(LLAMA3)

    [example] = Renderer(tokenizer).render(Text((Span(written, True),)), ROW)

    assert tokenizer.decode(example.input_ids) == "<|begin_of_text|>the cat<|eot_id|>"
    assert tokenizer.decode(Renderer(tokenizer).text_prompt(written)).count("<|begin_of_text|>") == 1
    assert example.weights == [0.0] + [1.0] * (len(example.input_ids) - 1)


def test_an_instruction_is_a_chat_where_there_is_a_template():
    tokenizer = tiny_tokenizer(CHATML)

    assert Renderer(tokenizer).render(TASK, ROW) == Renderer(tokenizer).render(
        talk("what is that\n\nthe mat", "the cat"), ROW
    )


@pytest.mark.parametrize("given", ["the mat", ""])
def test_an_instruction_is_alpacas_prompt_where_there_is_no_template(given):
    tokenizer = tiny_tokenizer(CHATML, template=None)

    [example] = Renderer(tokenizer).render(Instruction("what is {that}", given, "the cat"), ROW)

    prompt = tokenizer.decode(example.input_ids[: example.prompt_length])
    assert prompt.endswith(
        "### Instruction:\nwhat is {that}\n\n" + f"### Input:\n{given}\n\n" * bool(given) + "### Response:\n"
    )
    assert ("paired with an input" in prompt) == bool(given)
    assert tokenizer.decode(example.input_ids[example.prompt_length :]) == "the cat<|im_end|>"


def test_a_chat_prompt_is_what_stands_before_the_answer_in_training():
    renderer = Renderer(tiny_tokenizer(LLAMA3))
    talked = talk("what", "yes")

    [example] = renderer.render(talked, ROW)

    assert renderer.chat_prompt(talked.messages[:1]) == example.input_ids[: example.prompt_length]


def test_a_prompt_of_a_text_template_is_what_stands_before_the_answer_in_training():
    template = "what: {question}\nyes: [[{answer}]]"
    renderer = Renderer(tiny_tokenizer(LLAMA3))
    item = templated(template).parse({"question": "the cat", "answer": "the mat"})

    [example] = renderer.render(item, ROW)

    form = PromptForm("template", template)
    assert renderer.prompt_of("the cat", form) == example.input_ids[: example.prompt_length]
    assert renderer.prompt_of("the cat", PromptForm("text", template)) == renderer.text_prompt("the cat")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_answers_to_chat_prompts_stop_at_the_token_that_training_ends_turns_with(family):
    tokenizer = tiny_tokenizer(family)

    stops = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(family.stop)}
    assert Renderer(tokenizer).stop_ids(PromptForm("messages")) == stops
    assert Renderer(tokenizer).stop_ids(PromptForm("text")) == {tokenizer.eos_token_id}


def test_truncation_keeps_the_first_tokens_and_counts_the_rest():
    example = Example([1, 2, 3, 4], [0.0, 1.0, 1.0, 1.0], ROW)

    assert truncate(example, 3) == Example([1, 2, 3], [0.0, 1.0, 1.0], ROW, cut=1)
    assert truncate(example, 4) is example


# --- what is trained


def trained(tokenizer, item, train_on: str) -> list[str]:
    """The trained runs of each example as text."""
    return [
        tokenizer.decode(example.input_ids[start:end])
        for example in Renderer(tokenizer, train_on).render(item, ROW)
        for start, end in learned_runs(example)
    ]


def test_train_on_last_trains_the_last_answer_alone_behind_the_same_tokens():
    tokenizer, talked = tiny_tokenizer(CHATML), CONVERSATIONS["three answers"]
    [whole] = Renderer(tokenizer).render(talked, ROW)

    [example] = Renderer(tokenizer, "last").render(talked, ROW)

    assert example.input_ids == whole.input_ids
    assert trained(tokenizer, talked, "last") == ["the mat é 猫<|im_end|>"]


def test_train_on_last_refuses_a_last_answer_that_is_not_to_be_trained():
    talked = talk("what", "yes", "why", "no", learned=(True, True, True, False))

    with pytest.raises(BadRow) as error:
        Renderer(tiny_tokenizer(CHATML), "last").render(talked, ROW)

    assert error.value.what == (
        "`data.train_on: last` trains the last answer, and that has `train: false` or `weight: 0`"
    )


@EACH_CONVERSATION
@EACH_FAMILY
def test_train_on_all_trains_every_token_behind_the_first_once(family, talked):
    tokenizer = tiny_tokenizer(family)
    answers = Renderer(tokenizer).render(talked, ROW)

    examples = Renderer(tokenizer, "all").render(talked, ROW)

    assert [example.input_ids for example in examples] == [example.input_ids for example in answers]
    assert examples[0].weights == [0.0] + [1.0] * (len(examples[0].input_ids) - 1)
    for before, after in pairwise(examples):
        same = next(
            i for i, pair in enumerate(zip(before.input_ids, after.input_ids, strict=False)) if len({*pair}) == 2
        )
        assert after.weights == [0.0] * same + [1.0] * (len(after.input_ids) - same)


def test_train_on_all_refuses_a_conversation_that_leaves_an_answer_out():
    talked = talk("what", "yes", "why", "no", learned=(True, False, True, True))

    with pytest.raises(BadRow) as error:
        Renderer(tiny_tokenizer(CHATML), "all").render(talked, ROW)

    assert error.value.what == (
        "`data.train_on: all` trains every token, and an answer has `train: false` or `weight: 0`"
    )


@pytest.mark.parametrize("train_on", ["answers", "last", "all"])
def test_train_on_of_rows_that_are_no_conversation(train_on):
    tokenizer = tiny_tokenizer(LLAMA3, template=None)
    pair = Text((Span("what", False), Span(" the cat", True)))

    assert trained(tokenizer, pair, train_on) == (
        ["what the cat<|eot_id|>"] if train_on == "all" else [" the cat<|eot_id|>"]
    )
    [task] = trained(tokenizer, TASK, train_on)
    assert ("Instruction" in task) == (train_on == "all")
    tokens = Renderer(tokenizer, train_on).render(Tokens((5, 6, 7), (0.0, 0.0, 1.0)), ROW)
    assert tokens == [Example([5, 6, 7], [0.0, 1.0, 1.0] if train_on == "all" else [0.0, 0.0, 1.0], ROW)]


@pytest.mark.parametrize("train_on", ["answers", "last", "all"])
def test_the_weight_of_a_message_is_that_of_its_tokens_and_counts_in_the_divisor(train_on):
    tokenizer = tiny_tokenizer(CHATML)
    turns = talk("what", "yes", "why", "the cat").messages
    weighted = Conversation((*turns[:3], Message("assistant", "the cat", True, weight=0.5)))

    [plain] = Renderer(tokenizer, train_on).render(Conversation(turns), ROW)
    [example] = Renderer(tokenizer, train_on).render(weighted, ROW)

    count = len(tokenizer("the cat<|im_end|>")["input_ids"])
    assert example.input_ids == plain.input_ids
    assert example.weights == plain.weights[:-count] + [0.5] * count
    assert example.items == plain.items - count / 2


# --- tools and reasoning

AGENT = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ 'yes: ' + m.reasoning_content + '\n' }}{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALL, TOOL = {"name": "sat"}, {"name": "sat", "parameters": {}}
WITH_TOOLS = Conversation(
    (
        Message("user", "what", False),
        Message("assistant", "", True, fields={"tool_calls": [CALL], "reasoning_content": "the cat"}),
        Message("tool", "the mat", False, fields={"tool_call_id": "a"}),
        Message("assistant", "yes", True),
    ),
    tools=(TOOL,),
)


def test_tools_calls_and_reasoning_go_through_the_template_as_at_inference():
    tokenizer = tiny_tokenizer(CHATML, template=AGENT)

    [example] = Renderer(tokenizer).render(WITH_TOOLS, ROW)

    plain = [message.as_template_reads_it() for message in WITH_TOOLS.messages]
    prompts = [
        tokenizer.apply_chat_template(plain[:place], tools=[TOOL], add_generation_prompt=True)["input_ids"]
        for place in (1, 3)
    ]
    runs = learned_runs(example)
    assert [example.input_ids[:start] for start, _ in runs] == prompts
    assert [tokenizer.decode(example.input_ids[start:end]) for start, end in runs] == [
        'yes: the cat\n{"name": "sat"}<|im_end|>',
        "yes<|im_end|>",
    ]
    assert Renderer(tokenizer).chat_prompt(WITH_TOOLS.messages[:1], WITH_TOOLS.tools) == prompts[0]


@pytest.mark.parametrize("key", ["tools", "tool_calls", "reasoning_content"])
def test_what_the_template_would_leave_out_in_silence_makes_a_bad_row(key):
    template = (
        AGENT.replace("% if tools %", "% if false %") if key == "tools" else AGENT.replace(f"m.{key}", "m.nothing")
    )
    template = template.replace("+ m.nothing", "+ ''")

    with pytest.raises(BadRow) as error:
        Renderer(tiny_tokenizer(CHATML, template=template)).render(WITH_TOOLS, ROW)

    assert error.value.what == f"the chat template leaves `{key}` out"
    assert error.value.fix == f"use a tokenizer whose template reads `{key}`, or take it out of the rows"


def test_conversations_rendered_together_are_those_rendered_alone_unless_one_is_refused():
    tokenizer = tiny_tokenizer(GEMMA)
    one, two, refused = (
        [message.as_template_reads_it() for message in messages]
        for messages in (talk("what", "yes").messages, talk("why", "no").messages, BAD_ROWS[NO_SYSTEM][1])
    )

    together = rendered_together(tokenizer, [one, two], add_generation_prompt=True)

    assert together == [rendered(tokenizer, turns, add_generation_prompt=True) for turns in (one, two)]
    assert rendered_together(tokenizer, [one, two, refused], add_generation_prompt=True) is None


@pytest.mark.parametrize("train_on", ["answers", "last", "all"])
def test_rows_that_were_foreseen_are_rendered_as_they_are_alone(train_on):
    items = [*CONVERSATIONS.values(), TASK, Conversation(BAD_ROWS[NO_SYSTEM][1]), Text((Span("the cat", train=True),))]
    renderer = Renderer(tiny_tokenizer(GEMMA), train_on)

    def found(item):
        try:
            return renderer.render(item, ROW)
        except BadRow as error:
            return error.what

    alone = [found(item) for item in items]
    renderer.foresee(items)

    assert [found(item) for item in items] == alone


def test_what_a_row_with_tools_and_reasoning_asks_of_the_template_is_foreseen_whole(monkeypatch):
    renderer = Renderer(tiny_tokenizer(CHATML, template=AGENT))
    alone = renderer.render(WITH_TOOLS, ROW)
    renderer.foresee([WITH_TOOLS])
    monkeypatch.setattr("lora_cli.data.render.rendered", lambda *_, **__: pytest.fail("rendered by itself"))

    assert renderer.render(WITH_TOOLS, ROW) == alone
