"""Whether base and tokenizer are those that an adapter was trained with: others are refused, or said where they are allowed.

A tokenizer is another one where ids differ; a template that differs is noted.
"""

import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.errors import ModelError, Problem
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.base_files import fingerprint
from lora_cli.lora.identity import TokenizerFingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

PUT_ITS_TOKENIZER = "put the run's tokenizer files beside the adapter, or accept this one with `--allow-base-mismatch`"
# Spaces, cases, digits, scripts, code and signs: where tokenizers of one vocabulary part ways
SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces,\ttab,\n\nline ends \n and don't, CAN'T, naïve",
    "1234567890 3.14159 1,000,000",
    "def f(x):\n    return x ** 2  # comment",
    "Größe, 你好, мир, שלום, 👍🏽",
)


def tokenizer_identity(tokenizer: "PreTrainedTokenizerBase") -> TokenizerFingerprint:
    """The same for a tokenizer and for a copy that any version of `save_pretrained` made of it.

    (`data.encoder.tokenizer_fingerprint` is of the file's every byte, for runs that must go on to the same ones.)
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    template = tokenizer.chat_template
    return TokenizerFingerprint(
        vocabulary=_hash(vocabulary),
        cutting=_hash([tokenizer(text)["input_ids"] for text in SAMPLES]),
        template=_hash(sorted(template.items()) if isinstance(template, dict) else template) if template else "",
    )


def check_base(adapter: Adapter, folder: Path, *, allow: bool = False) -> None:
    """Raise ModelError for another base than the adapter was trained on, naming its tensors; one that is allowed is said."""
    if differences := adapter.check_base(fingerprint(folder), folder, allow=allow):
        differ = ", ".join(differences[:3]) + (" …" if len(differences) > 3 else "")
        log.warning("%s: NOT the base it was trained on (--allow-base-mismatch): %s differ", folder, differ)


def check_tokenizer(
    adapter: Adapter,
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    *,
    allow: bool = False,
    fix: str = PUT_ITS_TOKENIZER,
) -> None:
    """Raise ModelError when tokens have other ids than the adapter was trained with; another template is a warning.

    An adapter that names no tokenizer fits all.
    """
    differences = adapter.tokenizer.differences(tokenizer_identity(tokenizer)) if adapter.tokenizer else []
    if "vocabulary" in differences or "cutting" in differences:
        what = "has other tokens or other ids" if "vocabulary" in differences else "cuts texts into other tokens"
        if not allow:
            said = f"this tokenizer {what} than the one the adapter was trained with"
            raise ModelError(Problem(said, where=str(folder), fix=fix))
        log.warning("%s: this tokenizer %s than the one the adapter was trained with", folder, what)
    if "template" in differences:
        log.warning("%s: its chat template is not the one that the adapter was trained with", folder)


def _hash(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]
