"""Tiny bases that are quantised in their own files, as a person finds them on the hub."""

import logging
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, tiny_base
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def quantised_base(folder: Path, config) -> Path:
    """As `save_pretrained` writes a model that was loaded with a quantisation config."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    plain = tiny_base(folder / "plain", "qwen2")
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    return folder / "base"


def bitsandbytes(**settings) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **settings)


def torchao(name: str, **settings):
    """Skips the test where the package is not there."""
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(quantization, name)(**settings))


def int4():
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    return torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=quantization.PerGroup(16))


# What trains, as functions that make the config
STORAGES = {
    "bitsandbytes nf4": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes int8": lambda: bitsandbytes(load_in_8bit=True),
    "torchao int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao int4": int4,
}
