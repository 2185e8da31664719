"""Text -> tokens, exactly as the tokenizer makes them, but no piece of text twice.

    <|im_start|> | user\nwhat is … | <|im_end|> | \n | <|im_start|> | assistant\n

A tokenizer cuts a text at its special tokens first, and treats each piece between them on its own. A conversation is
rendered again and again, a turn longer each time: so its pieces are tokenized once and joined, where the tokenizer is
of a kind that allows it.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEPT = 1 << 22  # characters of pieces that are remembered


class Encoder:
    """Called with a text, gives its tokens, and none that the tokenizer would add around it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self._borders = _borders(tokenizer)
        longest_first = sorted(self._borders, key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        self._known: dict[str, list[int]]
        self.remembered: int  # characters
        self._forget()

    def __call__(self, text: str) -> list[int]:
        self.learn([text])
        found: list[int] = []
        for piece in self._pieces(text):
            found += self._known[piece]
        return found

    def learn(self, texts: Iterable[str]) -> None:
        """Tokenize all pieces of the texts that are not known yet, at once."""
        new = {piece for text in texts for piece in self._pieces(text)}.difference(self._known)
        if not new:
            return
        if self.remembered > KEPT:
            self._forget()
            self.learn(texts)
            return
        found = self.tokenizer(list(new), add_special_tokens=False, return_attention_mask=False, verbose=False)
        self._known.update(zip(new, found["input_ids"], strict=True))
        self.remembered += sum(map(len, new))

    def _pieces(self, text: str) -> list[str]:
        return self._cut.split(text) if self._cut else [text]

    def _forget(self) -> None:
        self._known, self.remembered = {"": [], **{border: [id] for border, id in self._borders.items()}}, 0


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 of all that decides how text becomes tokens: merges or vocabulary, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    written = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for way_of_the_last_call in ("padding", "truncation"):
        written.pop(way_of_the_last_call, None)
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    return hashlib.sha256(json.dumps([written, special, tokenizer.chat_template], sort_keys=True).encode()).hexdigest()


def _borders(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """The added tokens at which a text may be cut; none where what stands behind one depends on what stands before."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # only those of the `tokenizers` library have one
    if backend is None or tokenizer.split_special_tokens or backend.encode_special_tokens:
        return {}
    if backend.pre_tokenizer and _first_is_special(json.loads(backend.pre_tokenizer.__getstate__())):
        return {}
    found = {token.content: (id, token) for id, token in tokenizer.added_tokens_decoder.items() if not token.normalized}
    if any(token.lstrip or token.rstrip or token.single_word for _, token in found.values()):
        return {}
    return {content: id for content, (id, _) in found.items() if content}


def _first_is_special(state: object) -> bool:
    """Whether a pre-tokenizer treats the first piece of a text otherwise than the next ones."""
    if isinstance(state, dict):
        return state.get("prepend_scheme") == "first" or any(map(_first_is_special, state.values()))
    return isinstance(state, list) and any(map(_first_is_special, state))
