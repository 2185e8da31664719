"""A tiny base on disk, and an adapter of it with random factors, small beside the weights."""

import hashlib
from pathlib import Path

import pytest
import torch
from adapters import ROWS, logits_of, random_adapter
from tiny import tiny_base

from lora_cli.lora.adapter import Adapter


@pytest.fixture
def base(tmp_path):
    """base("gpt2", dtype=…) -> a folder as `save_pretrained` writes it."""

    def write(name: str = "llama", **saving) -> Path:
        return tiny_base(tmp_path / "base", name, **saving)

    return write


@pytest.fixture
def adapter_of():
    """adapter_of(folder, targets="qkvo", use_dora=True, …) -> an adapter of that base with random factors."""

    def make(folder: Path, targets="all-linear", **settings) -> Adapter:
        return random_adapter(folder, targets, **settings)

    return make


@pytest.fixture
def logits_with():
    """logits_with(folder, adapter=None) -> [rows, time, vocabulary] of a base, or of base + adapter, in float32."""

    def run(folder: Path, adapter: Adapter | None = None) -> list[torch.Tensor]:
        return logits_of(folder, adapter, ROWS)

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
