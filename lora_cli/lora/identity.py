"""What a tokenizer is, so that an adapter can tell another one: by what it does, not by how its files are written."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class TokenizerFingerprint:
    """Hashes of all tokens with their ids, of how sample texts are cut into them, and of the chat template.

    Made by `tokenizer_identity`, kept in an adapter's metadata. `template` is empty where there is none.
    """

    vocabulary: str
    cutting: str
    template: str

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "TokenizerFingerprint":
        found = json.loads(text)
        return cls(str(found["vocabulary"]), str(found["cutting"]), str(found["template"]))

    def differences(self, other: "TokenizerFingerprint") -> Sequence[str]:
        """What tells the two apart, in words; empty when they are the same."""
        return [name for name in ("vocabulary", "cutting", "template") if getattr(self, name) != getattr(other, name)]
