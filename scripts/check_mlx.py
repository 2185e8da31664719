"""What mlx-lm itself answers with an adapter that `lora export --to mlx` wrote, held against base + adapter; by hand.

python scripts/check_mlx.py write DIR          tiny bases, adapters and our log-probabilities, in this environment
pip install "mlx[cpu]" mlx-lm                  in another, 350 MB
python scripts/check_mlx.py read DIR           there: the largest difference for each architecture
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("llama", "llama-tied", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3")
ROWS = [[5, 17, 72, 31, 8, 90, 41], [7, 100, 12, 12, 64]]
SETTINGS = {
    "gemma3": {"num_hidden_layers": 6, "layer_types": None},  # mlx-lm looks for a global block among six
    # mlx-lm's Qwen 2 reads this from no config that transformers 5 writes, and takes the family's own
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}
TWISTS = {"rank_pattern": {r".*\.1\..*": 3}, "alpha_pattern": {".*mlp.*": 5}, "use_rslora": True, "size": 0.1}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("do", choices=["write", "read"])
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args()
    (write if asked.do == "write" else read)(asked.folder)
    return 0


def write(folder: Path) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny
    from adapters import logits_of, write_random
    from tiny import tiny_base

    from lora_cli.cli.export import export
    from lora_cli.lora.peft_format import load_adapter

    tiny.CONFIGS |= {name: _changed(tiny.CONFIGS[name], **settings) for name, settings in SETTINGS.items()}
    for name in NAMES:
        base = tiny_base(folder / name / "base", name)
        adapter = write_random(folder / name / "adapter", base, **TWISTS)
        export(adapter, "mlx", out=folder / name / "mlx")
        logits = logits_of(base, load_adapter(adapter), ROWS)
        (folder / name / "ours.json").write_text(json.dumps([row.log_softmax(-1).tolist() for row in logits]))


def read(folder: Path) -> None:
    import mlx.core as mx
    from mlx_lm.utils import load

    for name in NAMES:
        model, _ = load(str(folder / name / "base"), adapter_path=str(folder / name / "mlx"))
        bare, _ = load(str(folder / name / "base"))
        ours = json.loads((folder / name / "ours.json").read_text())
        apart, moved = 0.0, 0.0
        for row, expected in zip(ROWS, ours, strict=True):
            found, alone = (_log_probs(each, row) for each in (model, bare))
            apart = max(apart, mx.abs(found - mx.array(expected)).max().item())
            moved = max(moved, mx.abs(found - alone).max().item())
        print(f"{name:<12} differs by {apart:.1e}, where the adapter moves {moved:.2f}")


def _changed(make, **settings):
    return lambda: type(found := make())(**found.to_dict() | settings)


def _log_probs(model, row: list[int]):
    import mlx.core as mx

    logits = model(mx.array([row]))[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


if __name__ == "__main__":
    sys.exit(main())
