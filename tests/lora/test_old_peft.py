"""Adapters as earlier PEFTs wrote them: their keys of adapter_config.json and names of tensors, from their own sources."""

import json

import pytest
import torch
from layers import relative_difference
from safetensors.torch import save_file
from tiny import tiny_model

from lora_cli.errors import SafetyError
from lora_cli.lora.peft_format import load_adapter

IDS = torch.tensor([[5, 17, 200, 31, 8, 90, 41], [7, 300, 12, 12, 64, 1, 2]])
PATH = "model.layers.{}.self_attn.q_proj"
SHARED = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "some/base", "bias": "none",
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "layers_pattern": None,
    "layers_to_transform": None, "lora_alpha": 6, "lora_dropout": 0.05, "modules_to_save": None, "peft_type": "LORA",
    "r": 4, "rank_pattern": {}, "revision": None, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM",
}  # fmt: skip
MEGATRON = {"loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core"}
CONFIGS = {
    "0.6.2": SHARED,
    "0.10.0": SHARED | MEGATRON | {"layer_replication": None, "use_dora": False, "use_rslora": True},
    "0.14.0": SHARED
    | MEGATRON
    | {"eva_config": None, "exclude_modules": None, "layer_replication": None, "lora_bias": False, "use_dora": False}
    | {"use_rslora": True},
}


@pytest.mark.parametrize("version", CONFIGS)
def test_an_adapter_of_an_earlier_peft_answers_as_its_formula(version, tmp_path):
    config, generator = CONFIGS[version], torch.Generator().manual_seed(1)
    scale = 6 / 4**0.5 if config.get("use_rslora") else 6 / 4
    expected, tensors = tiny_model("llama"), {}
    for i in range(2):
        A, B = torch.randn(4, 32, generator=generator) / 6, torch.randn(32, 4, generator=generator) / 6
        tensors |= {f"base_model.model.{PATH.format(i)}.lora_{part}.weight": t for part, t in (("A", A), ("B", B))}
        expected.get_submodule(PATH.format(i)).weight.data += scale * B @ A
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))

    model = tiny_model("llama")
    load_adapter(tmp_path).inject_into(model)

    with torch.no_grad():
        assert relative_difference(model(input_ids=IDS).logits, expected(input_ids=IDS).logits) <= 1e-6


def test_the_pickle_that_the_first_pefts_wrote_is_refused_with_the_way_to_convert(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(SHARED))
    (tmp_path / "adapter_model.bin").write_bytes(b"")

    with pytest.raises(SafetyError, match=r"adapter_model\.bin is a pickle") as error:
        load_adapter(tmp_path)

    assert "save_pretrained" in error.value.problems[0].fix
