"""Tokens by name: their ids in a tokenizer, and new ones that a recipe adds to it."""

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_cli.errors import ModelError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def add_tokens(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str]) -> None:
    """Add `lora.new_tokens` as special tokens: text is cut at them first, and none is ever cut itself.

    Raises ModelError for one that the tokenizer has.
    """
    vocabulary = tokenizer.get_vocab()
    if known := [token for token in tokens if token in vocabulary]:
        what = f"`lora.new_tokens` names `{known[0]}`, which the tokenizer has already"
        raise ModelError(Problem(what, fix="name it in `lora.trainable_tokens`, which trains the rows of known tokens"))
    from tokenizers import AddedToken

    new = [AddedToken(token, special=True, normalized=False) for token in dict.fromkeys(tokens)]
    tokenizer.add_tokens(new, special_tokens=True)


def ids_of_tokens(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str]) -> tuple[int, ...]:
    """The ids of `lora.trainable_tokens`, in their order. Raises ModelError for texts that are no single token."""
    vocabulary = tokenizer.get_vocab()
    if lost := [token for token in tokens if token not in vocabulary]:
        special = [token for token in tokenizer.get_added_vocab() if token not in tokens]
        near = difflib.get_close_matches(lost[0], special, n=5, cutoff=0.3) or special[-5:]
        what = f"`lora.trainable_tokens` names `{lost[0]}`, which is no token of this tokenizer"
        fix = f"use one that it has, such as {', '.join(near)}" if near else "use one that it has"
        raise ModelError(Problem(what, fix=fix))
    return tuple(sorted({vocabulary[token] for token in tokens}))
