"""A tiny base on disk, and an adapter of it with random factors, small beside the weights."""

import hashlib
from pathlib import Path

import pytest
import torch
from tiny import tiny_base
from transformers import AutoModelForCausalLM

from lora_cli.lora.adapter import Adapter
from lora_cli.lora.base_files import fingerprint
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.inject import inject, linears, lora_layers
from lora_cli.lora.targets import choose_targets

ROWS = [[5, 17, 200, 31, 8, 90, 41], [7, 300, 12, 12, 64]]


@pytest.fixture
def base(tmp_path):
    """base("gpt2", dtype=…) -> a folder as `save_pretrained` writes it."""

    def write(name: str = "llama", **saving) -> Path:
        return tiny_base(tmp_path / "base", name, **saving)

    return write


@pytest.fixture
def adapter_of():
    """adapter_of(folder, targets="qkvo", use_dora=True, …) -> an adapter of that base with random factors."""

    def make(folder: Path, targets="all-linear", *, size: float = 0.02, seed: int = 1, **settings) -> Adapter:
        model = load(folder)
        head = () if targets != "all-linear" else [path for path in linears(model) if path.endswith("lm_head")]
        paths = choose_targets(targets, list(linears(model)), head=head)
        config = LoRAConfig(**{"r": 4, "lora_alpha": 8, "target_modules": tuple(paths)} | settings)
        inject(model, config, paths)
        randomize(model, size, seed)
        return Adapter.of(model, config, fingerprint(folder))

    return make


@pytest.fixture
def logits_with():
    """logits_with(folder, adapter=None) -> [rows, time, vocabulary] of a base, or of base + adapter, in float32."""

    def run(folder: Path, adapter: Adapter | None = None) -> list[torch.Tensor]:
        model = load(folder)
        if adapter is not None:
            adapter.inject_into(model)
        with torch.no_grad():
            return [model(input_ids=torch.tensor([row])).logits[0] for row in ROWS]

    return run


@pytest.fixture
def rows():
    return ROWS


@pytest.fixture
def hashes():
    """hashes(folder) -> the bytes of every file in it, as a value to compare."""

    def read(folder: Path) -> dict[str, str]:
        return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.rglob("*.*")}

    return read


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def randomize(model, size: float, seed: int) -> None:
    """Updates with entries of about `size`; DoRA's magnitudes are far from where they start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_A.normal_(generator=generator)
            layer.lora_B.normal_(std=size, generator=generator)
            if layer.magnitude is not None:
                layer.magnitude.mul_(1 + torch.rand(layer.magnitude.shape, generator=generator))
