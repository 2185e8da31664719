"""What each token of a row adds to its text, so that tokens can be shown one by one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HALF = "\ufffd"  # what a decoder writes for a character that is not complete yet
MOST_BYTES = 4  # of a character in UTF-8, and so tokens that it may take


def token_texts(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """One text a token; they join to the text of all. A token that ends inside a character adds an empty one.

    Each is decoded behind the token before it, because many tokenizers write a text's first word without its space.
    """
    texts: list[str] = []
    anchor = done = 0  # tokens before `done` are written; those from `anchor` on are decoded again, as context
    for end in range(1, len(ids) + 1):
        before = _decode(tokenizer, ids[anchor:done])
        text = _decode(tokenizer, ids[anchor:end])
        if text.endswith(HALF) and end < len(ids) and end - done < MOST_BYTES:
            texts.append("")
            continue
        texts.append(text[len(before) :])
        anchor, done = done, end
    return texts


def _decode(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
