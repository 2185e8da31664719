import random

import pytest
from templates import FAMILIES, SENTENCES, space_before_words, tiny_tokenizer
from tokenizers import AddedToken, pre_tokenizers

from lora_cli.data import encoder
from lora_cli.data.encoder import Encoder


def only_the_first_gets_a_space():
    tokenizer = space_before_words()
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return tokenizer


def a_space_before_every_piece():
    tokenizer = tiny_tokenizer(FAMILIES["chatml"])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def a_token_that_takes_the_space_before_it():
    tokenizer = tiny_tokenizer(FAMILIES["chatml"])
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True, special=True)], special_tokens=True)
    return tokenizer


def a_token_that_begins_like_another():
    tokenizer = tiny_tokenizer(FAMILIES["chatml"])
    tokenizer.add_tokens(["<|im_end|><", "cat sat"])
    return tokenizer


MAKERS = [
    space_before_words,
    only_the_first_gets_a_space,
    a_space_before_every_piece,
    a_token_that_takes_the_space_before_it,
    a_token_that_begins_like_another,
    *FAMILIES.values(),
]


def mixtures(tokenizer, count=200):
    """Words, white space and special tokens, whole and in parts, in any order."""
    generator = random.Random(0)
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    parts = [*added, *added, *SENTENCES, " ", "\n", "  \n", "é", "<|im", "_start|>", "<|im_", "<", "the cat", " <mask>"]
    return ["".join(generator.choices(parts, k=generator.randrange(9))) for _ in range(count)]


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: getattr(maker, "__name__", None) or maker.stop)
def test_a_text_has_the_tokens_that_the_tokenizer_gives_it_at_once(maker):
    tokenizer = maker() if callable(maker) else tiny_tokenizer(maker)
    encode, texts = Encoder(tokenizer), mixtures(tokenizer)

    assert [encode(text) for text in texts] == tokenizer(texts, add_special_tokens=False)["input_ids"]


def test_a_longer_conversation_costs_only_what_is_new(monkeypatch):
    tokenizer, asked = tiny_tokenizer(FAMILIES["chatml"]), []
    call = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, texts, **given: asked.extend(texts) or call(self, texts, **given)
    )
    encode = Encoder(tokenizer)
    encode("<|im_start|>user\nwhat<|im_end|>\n")
    asked.clear()

    encode("<|im_start|>user\nwhat<|im_end|>\n<|im_start|>assistant\nthat<|im_end|>\n")

    assert asked == ["assistant\nthat"]


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(encoder, "KEPT", 100)
    encode = Encoder(tiny_tokenizer(FAMILIES["chatml"]))

    for number in range(200):
        encode(f"the cat {number}<|im_end|>")

    assert encode.remembered < 200
