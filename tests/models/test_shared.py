"""One base for several runs: loaded once, and what one run wraps the others do not see."""

import torch
from tiny import tiny_base

from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.inject import inject, lora_layers
from lora_cli.models.base import resolve_base
from lora_cli.models.load import load_model
from lora_cli.models.shared import loaded_once, shared_copy

TARGET = "model.layers.0.self_attn.q_proj"


def counting(made: list):
    def load(base, **how):
        made.append(how)
        return load_model(base, **how)

    return load


def test_a_base_is_loaded_once_and_again_only_where_another_is_asked_for(tmp_path):
    base, made = resolve_base(str(tiny_base(tmp_path / "llama")), None), []
    load = loaded_once(counting(made))

    first, second = (load(base, dtype=torch.float32) for _ in range(2))
    load(base, dtype=torch.bfloat16)

    assert len(made) == 2
    assert first is not second
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert mine is theirs


def test_layers_in_one_copy_are_not_in_the_other(tmp_path):
    model = load_model(resolve_base(str(tiny_base(tmp_path / "llama")), None), dtype=torch.float32)
    one, other = shared_copy(model), shared_copy(model)
    ids = torch.arange(3, 9).unsqueeze(0)
    before = model(ids).logits

    [layer] = inject(one, LoRAConfig(r=2, lora_alpha=4, target_modules=("q_proj",)), [TARGET]).values()
    torch.nn.init.ones_(layer.lora_B)

    assert not lora_layers(other)
    assert torch.equal(other(ids).logits, before)
    assert not torch.equal(one(ids).logits, before)
