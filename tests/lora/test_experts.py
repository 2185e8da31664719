"""Experts whose update is multiplied and never built: the same numbers, and no copy of all experts in memory."""

import pytest
import torch
from layers import randomize, relative_difference
from tiny import tiny_model
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.experts import LoRAExperts, Sum
from lora_cli.lora.inject import inject, lora_layers

IDS = torch.tensor([[5, 17, 200, 31, 8, 90, 41], [7, 300, 12, 12, 64, 1, 2]])
NAMES = ("gate_up_proj", "down_proj")
MODELS = ("mixtral", "qwen3_moe", "gpt_oss")
WAYS = ("eager", "grouped_mm", "batched_mm")


def adapted(name: str, way: str, dtype: torch.dtype = torch.float32):
    model = tiny_model(name, dtype=dtype)
    model.set_experts_implementation(way)
    paths = [f"model.layers.{i}.mlp.experts.{parameter}" for i in range(2) for parameter in NAMES]
    config = LoRAConfig(r=3, lora_alpha=6, target_modules=(), target_parameters=tuple(f"experts.{n}" for n in NAMES))
    inject(model, config, paths)
    randomize(model)
    return model


def build_all(self: LoRAExperts, *args, **kwargs):
    """What PEFT does: the sum of every expert, in the place of the parameter."""
    return functional_call(self.base, {name: getattr(self, name).acting().whole() for name in NAMES}, args, kwargs)


def answers_and_gradients(model) -> tuple[torch.Tensor, list[torch.Tensor]]:
    logits = model(input_ids=IDS).logits
    factors = [f for layer in lora_layers(model).values() for f in (layer.lora_A, layer.lora_B)]
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    return logits.detach(), torch.autograd.grad((logits * direction).sum(), factors)


def kept_bytes(model) -> int:
    """Of what the forward keeps for the backward, beside the model's own tensors."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=IDS).logits.sum()
    size = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    return size


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_however_experts_compute_it_is_as_if_all_sums_were_built_and_none_is(name, way, monkeypatch):
    with monkeypatch.context() as building:
        building.setattr(LoRAExperts, "forward", build_all)
        expected, gradients = answers_and_gradients(adapted(name, way))
    monkeypatch.setattr(Sum, "whole", None)

    found, ours = answers_and_gradients(adapted(name, way))

    assert relative_difference(found, expected) <= 5e-6
    assert all(relative_difference(a, b) <= 5e-6 for a, b in zip(ours, gradients, strict=True))


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", MODELS)
def test_a_forward_keeps_no_copy_of_the_experts(name, way, monkeypatch):
    model = adapted(name, way)
    _, *others = lora_layers(model).values()  # in front of the first there is nothing that needs a gradient
    experts = sum(layer.frozen.tensor.nbytes for layer in others)
    lean = kept_bytes(model)

    monkeypatch.setattr(LoRAExperts, "forward", build_all)
    whole = kept_bytes(model)

    assert whole - lean > 0.6 * experts  # the rest are narrow products, larger here than rows are wide


def test_what_is_no_known_product_sees_the_sum():
    layer = next(iter(lora_layers(adapted("mixtral", "eager")).values()))
    weight, merged = layer.acting(), layer.acting().whole()

    assert torch.equal(torch.einsum("eoi->oei", weight), merged.transpose(0, 1))
    assert torch.equal(torch.einsum("eoi->oei", weight.transpose(-1, -2)), merged.mT.transpose(0, 1))
    assert weight.dtype == merged.dtype
    with pytest.raises(NotImplementedError):
        weight.transpose(0, 1)
