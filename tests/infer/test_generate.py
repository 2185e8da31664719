"""Greedy answers: when they stop, and that asking leaves a model as it was."""

import pytest
import torch
from tiny import CONFIGS, byte_tokenizer, tiny_model

from lora_cli.data.render import Renderer
from lora_cli.data.types import UNKNOWN_FORM
from lora_cli.errors import ModelError
from lora_cli.infer.generate import answer

PROMPTS = ["what", "what is the answer to that question", "mat"]


@pytest.mark.parametrize("name", CONFIGS)
def test_an_answer_does_not_depend_on_the_prompts_beside_it(name):
    model, tokenizer = tiny_model(name), byte_tokenizer()

    together = answer(model, tokenizer, PROMPTS, max_new_tokens=6)

    assert together == {p: answer(model, tokenizer, [p], max_new_tokens=6)[p] for p in PROMPTS}
    assert together == answer(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=2)


def test_prompts_of_like_length_are_answered_together_the_longest_first():
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    prompts, asked = ["mat", "the mat " * 9, "hat", "the cat " * 9], []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, y: asked.append(tuple(inputs[0].shape)))

    answers = answer(model, tokenizer, prompts, max_new_tokens=1, batch_size=2)

    lengths = sorted((len(Renderer(tokenizer).prompt_of(prompt, UNKNOWN_FORM)) for prompt in prompts), reverse=True)
    assert asked == [(2, lengths[0]), (2, lengths[2])]
    assert list(answers) == prompts


@pytest.mark.parametrize(("stop", "answered"), [([2, 10], ""), (10, ""), ([2], "tt"), (None, "tt")])
def test_an_answer_ends_at_the_end_tokens_of_tokenizer_and_generation_config(stop, answered):
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    model.generation_config.eos_token_id = stop
    word = tokenizer.convert_tokens_to_ids("t")
    spoken = iter([10, word, word, tokenizer.eos_token_id, word])  # whatever it is asked

    def speak(module, inputs, output):
        return torch.nn.functional.one_hot(torch.tensor(next(spoken)), output.shape[-1]).expand_as(output).float()

    model.lm_head.register_forward_hook(speak)

    said = answer(model, tokenizer, ["what"], max_new_tokens=5)["what"]

    assert said.removeprefix(tokenizer.decode(10).strip()) == answered


@pytest.mark.parametrize("training", [True, False])
def test_asking_leaves_the_model_in_its_mode(training):
    model = tiny_model("llama").train(training)

    answer(model, byte_tokenizer(), ["what"], max_new_tokens=2)

    assert all(module.training == training for module in model.modules())


def test_without_a_template_the_prompt_stands_as_it_is():
    model, tokenizer = tiny_model("llama"), byte_tokenizer(template=None)

    found = answer(model, tokenizer, ["what is"], max_new_tokens=1)["what is"]

    with torch.no_grad():
        ids = tokenizer("what is", return_tensors="pt").input_ids
        expected = model(ids).logits[0, -1].argmax()
    assert found == tokenizer.decode(expected, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_an_answer_ends_where_the_models_positions_end(name):
    model = tiny_model(name)
    model.generation_config.eos_token_id = None

    answers = answer(model, byte_tokenizer(), PROMPTS, max_new_tokens=10_000)

    assert list(answers) == PROMPTS


def test_a_prompt_that_is_too_long_for_the_model_is_told():
    with pytest.raises(ModelError, match=r"a prompt has \d+ tokens, and the model reads 256 at most"):
        answer(tiny_model("gpt2"), byte_tokenizer(), ["mat " * 300])
