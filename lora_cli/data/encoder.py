"""Text -> tokens, exactly as the tokenizer makes them, but no piece of text twice.

    <|im_start|> | user\nwhat is … | <|im_end|> | \n | <|im_start|> | assistant\n

A tokenizer cuts a text at its special tokens first, and treats each piece between them on its own. A conversation is
rendered again and again, a turn longer each time: so its pieces are tokenized once and joined, where the tokenizer is
of a kind that allows it.

    what |  is |  a |  hack |  ?

Byte-level BPE then cuts each piece into words, which it treats on their own too. Where it is known to cut before every
blank that stands behind something else, so do we: most words of a text are known already, and joining what is known
takes a fraction of the time that tokenizing takes.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEPT = 1 << 22  # characters of pieces that are remembered
KEPT_BESIDE = 10  # what else a piece counts for, however short it is

# How byte-level BPE cuts a text into words. None of the alternatives goes on with a blank behind what is none, and none
# looks back, nor past a blank: so a match ends before each such blank, and what follows does not depend on what precedes.
CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORDS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    *(  # Llama 3, Qwen 2 and 3, Phi-4
        CONTRACTED + r"[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|" + REST
        for numbers in (r"\p{N}{1,3}", r"\p{N}")
    ),
    r"[^\r\n\p{L}\p{N}]?" + UPPER + "*" + LOWER + r"+|[^\r\n\p{L}\p{N}]?" + UPPER + "+" + LOWER + r"*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + REST,  # Mistral Nemo
}
BEFORE_BLANKS = re.compile(r"(?<=\S)(?= )")
BLANK_BEHIND_BLANK = re.compile(r"\s ")


class Encoder:
    """Called with a text, gives its tokens, and none that the tokenizer would add around it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self._borders = _borders(tokenizer)
        longest_first = sorted(self._borders, key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        self._in_words = bool(self._borders) and _is_cut_before_blanks(tokenizer)
        self._known: dict[str, list[int]]  # words; pieces, where those are not cut
        self.remembered: int  # characters
        self._foreseen: dict[str, list[int]] = {}  # pieces
        self._forget()

    def __call__(self, text: str) -> list[int]:
        return list(chain.from_iterable(map(self._tokens, self._pieces(text))))

    def foresee(self, texts: Iterable[str]) -> None:
        """Tokenize together what will be asked for one by one."""
        pieces = set(chain.from_iterable(map(self._pieces, texts)))
        words = {piece: self._words(piece) for piece in pieces}
        self._learn(set(chain.from_iterable(words.values())))
        self._foreseen = {piece: self._joined(parts) for piece, parts in words.items()}

    def _tokens(self, piece: str) -> list[int]:
        return self._foreseen[piece] if piece in self._foreseen else self._joined(self._words(piece))

    def _joined(self, words: list[str]) -> list[int]:
        try:
            return list(chain.from_iterable(map(self._known.__getitem__, words)))
        except KeyError:
            self._learn(set(words))
            return self._joined(words)

    def _learn(self, words: set[str]) -> None:
        """Tokenize at once those that are not known yet."""
        if self.remembered > KEPT:
            self._forget()
        if new := list(words.difference(self._known)):
            found = self.tokenizer(new, add_special_tokens=False, return_attention_mask=False, verbose=False)
            self._known.update(zip(new, found["input_ids"], strict=True))
            self.remembered += sum(map(len, new)) + KEPT_BESIDE * len(new)

    def _pieces(self, text: str) -> list[str]:
        return self._cut.split(text) if self._cut else [text]

    def _words(self, piece: str) -> list[str]:
        """The piece, cut before each blank behind something else, where its words are tokenized one by one."""
        if not self._in_words or piece in self._borders:
            return [piece]
        if BLANK_BEHIND_BLANK.search(piece):
            return BEFORE_BLANKS.split(piece)
        first, *others = piece.split(" ")
        return [first, *[" " + word for word in others]]

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


def _is_cut_before_blanks(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether every blank behind something else begins a new word, which has the same tokens wherever it stands."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model, normalizer, found = state["model"], state["normalizer"], state["pre_tokenizer"] or {"type": ""}
    parts = found["pretokenizers"] if found["type"] == "Sequence" else [found]
    return (
        model["type"] == "BPE"
        and not model["dropout"]
        and (normalizer is None or normalizer["type"] == "NFC")  # which nothing composes with a blank
        and all(part["type"] in ("Digits", "ByteLevel") or _cuts_words(part) for part in parts)
        and any(map(_cuts_words, parts))
        and not any(" " in token["content"] for token in state["added_tokens"])
    )


def _cuts_words(part: Mapping[str, Any]) -> bool:
    """Whether this part of a pre-tokenizer cuts a text into words, in one of the ways we know."""
    if part["type"] == "Split":
        return part["pattern"].get("Regex") in WORDS and part["behavior"] == "Isolated" and not part["invert"]
    return part["type"] == "ByteLevel" and part["use_regex"] and not part["add_prefix_space"]


def _first_is_special(state: object) -> bool:
    """Whether a pre-tokenizer treats the first piece of a text otherwise than the next ones."""
    if isinstance(state, dict):
        return state.get("prepend_scheme") == "first" or any(map(_first_is_special, state.values()))
    return isinstance(state, list) and any(map(_first_is_special, state))
