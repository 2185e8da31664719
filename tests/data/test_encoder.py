from functools import partial

import pytest
from templates import FAMILIES, mixtures, space_before_words, tiny_tokenizer
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

from lora_cli.data import encoder
from lora_cli.data.encoder import WORDS, Encoder


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


def words_of_gpt2_behind_single_digits():
    tokenizer = tiny_tokenizer(FAMILIES["chatml"])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def composed_characters():
    tokenizer = tiny_tokenizer(FAMILIES["chatml"], words=max(WORDS))
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def two_words_as_one():
    tokenizer = tiny_tokenizer(FAMILIES["chatml"])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\w+ \w+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


CUT_INTO_WORDS = [
    *(partial(tiny_tokenizer, FAMILIES["llama3"], words=words) for words in sorted(WORDS)),
    words_of_gpt2_behind_single_digits,
    composed_characters,
]
MAKERS = [
    *CUT_INTO_WORDS,
    two_words_as_one,
    space_before_words,
    only_the_first_gets_a_space,
    a_space_before_every_piece,
    a_token_that_takes_the_space_before_it,
    a_token_that_begins_like_another,
    *FAMILIES.values(),
]


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: getattr(maker, "__name__", None))
def test_a_text_has_the_tokens_that_the_tokenizer_gives_it_at_once(maker):
    tokenizer = maker() if callable(maker) else tiny_tokenizer(maker)
    encode, texts = Encoder(tokenizer), mixtures(tokenizer)

    assert [encode(text) for text in texts] == tokenizer(texts, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("maker", CUT_INTO_WORDS, ids=lambda maker: getattr(maker, "__name__", None))
def test_of_a_text_only_the_words_that_are_new_are_tokenized(maker, monkeypatch):
    tokenizer = maker()
    encode, asked = Encoder(tokenizer), []
    encode("the cat sat")
    call = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, texts, **given: asked.extend(texts) or call(self, texts, **given)
    )

    encode.foresee(["the cat sat on", "the cat  sat"])

    assert sorted(asked) == ["  sat", " on"]


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

    assert encode.remembered < 300
