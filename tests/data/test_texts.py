import pytest
from templates import space_before_words, tiny_tokenizer

from lora_cli.data.texts import token_texts

TEXTS = ["the cat sat\n\non the mat", "é 猫 🙂🙃 zwei  Leerzeichen", " begins with a space", "\x00\u202e", "ends in 🙂"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("build", [tiny_tokenizer, space_before_words])
def test_token_texts_join_to_the_text_of_all_tokens(text, build):
    tokenizer = build()
    ids = tokenizer(text)["input_ids"]

    texts = token_texts(tokenizer, ids)

    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids)


def test_half_a_character_at_the_end_is_still_written():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("the 猫")["input_ids"][:-1]

    assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_word_keeps_the_space_before_it():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("the cat")["input_ids"]

    assert "".join(token_texts(tokenizer, ids)[1:]) == tokenizer.decode(ids)[len(tokenizer.decode(ids[:1])) :]
