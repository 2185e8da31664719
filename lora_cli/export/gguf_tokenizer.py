"""A tokenizer in a GGUF file: tokens, merges and special ids, and `pre`, llama.cpp's name for how it cuts text first.

A base that came as a GGUF file lends its own, as it is. Others are written where their way to cut text is one that
llama.cpp is known to have; the rest are refused, for llama.cpp would read the same text as other tokens.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from lora_cli.errors import ModelError, Problem
from lora_cli.export.gguf import SUFFIX, gguf_package
from lora_cli.limits import read_json
from lora_cli.models.base import Base

TOKENIZER = "tokenizer.json"
FIELDS = "tokenizer."
TOKENS = "tokenizer.ggml.tokens"
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")


def write_tokenizer(writer, folder: Path, size: int, *, base: Base) -> None:
    """Raises ModelError for a tokenizer that llama.cpp would not read as it is."""
    tokens = _tokens(folder, size)
    lent = _lent(base)
    if lent is not None and [token for token, _ in tokens] == lent.fields[TOKENS].contents():
        _copy(lent, writer)
    else:
        _write(writer, folder, tokens)


def _lent(base: Base):
    """A reader over the base's own GGUF file, where it came as one."""
    file = Path(base.name).expanduser()
    return gguf_package().GGUFReader(file) if file.suffix == SUFFIX and file.is_file() else None


def _copy(source, writer) -> None:
    gguf = gguf_package()
    for name, field in source.fields.items():
        if name.startswith(FIELDS):
            array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if array else None)


def _write(writer, folder: Path, tokens: list[tuple[str, int]]) -> None:
    gguf = gguf_package()
    pre = _pre(folder)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([type for _, type in tokens])
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=len(tokens)).add_to_gguf(writer, quiet=True)


def _tokens(folder: Path, size: int) -> list[tuple[str, int]]:
    """Each id's token and type; ids that no token has are there as unused ones, up to the model's embeddings."""
    gguf = gguf_package()
    core = _core(folder)
    types = gguf.TokenType
    found = {id: (token, types.NORMAL) for token, id in dict(core["model"].get("vocab") or {}).items()}
    for token in core.get("added_tokens") or ():
        found[token["id"]] = (token["content"], types.CONTROL if token["special"] else types.USER_DEFINED)
    return [found.get(id, (f"[PAD{id}]", types.UNUSED)) for id in range(max(size, *(id + 1 for id in found)))]


def _core(folder: Path) -> dict:
    file = folder / TOKENIZER
    if not file.is_file():
        raise ModelError(_unknown(folder, "it has no tokenizer.json"))
    core = read_json(file, most_bytes=200_000_000)
    if not (isinstance(core.get("model"), dict) and isinstance(core["model"].get("vocab"), dict)):
        raise ModelError(_unknown(folder, "its tokenizer.json is no BPE's"))
    return core


def _pre(folder: Path) -> str:
    """llama.cpp's name for a byte-level BPE's way to cut text."""
    core = _core(folder)
    steps = _steps(core.get("pre_tokenizer"))
    if core["model"].get("type") != "BPE" or not any(step["type"] == "ByteLevel" for step in steps):
        raise ModelError(_unknown(folder, "it is no byte-level BPE"))
    if core.get("normalizer") not in (None, {"type": "NFC"}):
        raise ModelError(_unknown(folder, "it changes text before it is cut"))
    known = (name for name, cuts in PRE.items() if cuts(steps))
    found = next(known, None)
    if found is None:
        raise ModelError(_unknown(folder, f"it cuts text by {json.dumps(steps)[:100]} …"))
    return found


def _steps(pre_tokenizer: object) -> list[dict]:
    if not isinstance(pre_tokenizer, dict):
        return []
    inner = pre_tokenizer.get("pretokenizers")
    return inner if isinstance(inner, list) else [pre_tokenizer]


def _by_bytes(steps: list[dict]) -> bool:
    """GPT-2's own regular expression is part of the last step."""
    return bool(steps[-1].get("use_regex", True)) and not steps[-1].get("add_prefix_space")


def _splits(regex: str) -> Callable[[list[dict]], bool]:
    return lambda steps: (
        [step["type"] for step in steps] == ["Split", "ByteLevel"]
        and (steps[0].get("pattern") == {"Regex": regex} and not steps[1].get("use_regex", True))
    )


PRE: Mapping[str, Callable[[list[dict]], bool]] = {
    "gpt-2": lambda steps: [step["type"] for step in steps] == ["ByteLevel"] and _by_bytes(steps),
    "smollm": lambda steps: (
        [step["type"] for step in steps] == ["Digits", "ByteLevel"]
        and bool(steps[0].get("individual_digits"))
        and _by_bytes(steps)
    ),
    "llama-bpe": _splits(LLAMA_3),
    "qwen2": _splits(QWEN_2),
}


def _unknown(folder: Path, why: str) -> Problem:
    return Problem(
        f"llama.cpp may not read its tokenizer as it is: {why}",
        where=str(folder / TOKENIZER),
        fix="give the base's GGUF file with `--base`, whose tokenizer is taken as it is, or `--to gguf-adapter`",
    )
