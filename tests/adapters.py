"""Adapters of tiny bases on disk, with random factors, small beside the weights; and what a base answers with them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from layers import relative_difference
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lora_cli.lora.adapter import Adapter
from lora_cli.lora.base_files import fingerprint
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.inject import disabled, inject, lora_layers, names_of_targets, remove, trained_beside
from lora_cli.lora.peft_format import load_adapter, save_adapter
from lora_cli.lora.targets import choose_targets
from lora_cli.lora.weights import fan_in_fan_out, weights_of
from lora_cli.models.load import by_name_alone

ROWS = [[5, 17, 200, 31, 8, 90, 41], [7, 300, 12, 12, 64]]


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def random_adapter(
    folder: Path, targets="all-linear", *, size: float = 0.02, seed: int = 1, layers=None, whole=(), **settings
) -> Adapter:
    """An adapter of the base in `folder`, which it names; updates have entries of about `size` · √r · scale.

    So is what moves beside the layers: modules trained `whole`, and what the `settings` say of biases and tokens.
    """
    model = load(folder)
    paths = choose_targets(targets, list(weights_of(model)), head=by_name_alone(model), layers=layers)
    modules, parameters = names_of_targets(model, paths)
    own = {"target_modules": modules, "target_parameters": parameters, "modules_to_save": tuple(whole)}
    config = LoRAConfig(**{"r": 4, "lora_alpha": 8} | own | settings)
    inject(model, config, paths, whole=whole)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_A.normal_(generator=generator)
            layer.lora_B.normal_(std=size, generator=generator)
            if layer.magnitude is not None:
                layer.magnitude.mul_(1 + torch.rand(layer.magnitude.shape, generator=generator))
        for module in trained_beside(model).values():
            for parameter in (p for p in module.parameters() if p.requires_grad):
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return Adapter.of(model, config, fingerprint(folder))


def write_random(out: Path, base: Path, targets="all-linear", **settings) -> Path:
    """A folder with such an adapter, as `lora` writes it."""
    adapter = random_adapter(base, targets, **settings)
    adapter = replace(adapter, config=replace(adapter.config, base_model_name_or_path=str(base)))
    save_adapter(adapter, out, transposed=fan_in_fan_out(weights_of(load(base)).values()))
    return out


def logits_of(folder: Path, adapter: Adapter | None = None, rows=ROWS) -> list[Tensor]:
    """[time, vocabulary] for each row, of a base, or of base + adapter, in float32."""
    model = load(folder)
    if adapter is not None:
        adapter.inject_into(model)
    return answers_of(model, rows)


def answers_of(model: PreTrainedModel, rows=ROWS) -> list[Tensor]:
    with torch.no_grad():
        return [model(input_ids=torch.tensor([row])).logits[0] for row in rows]


def assert_read_by_peft_and_taken_off(
    model: PreTrainedModel,
    adapter: Adapter,
    fresh: Callable[[], PreTrainedModel],
    logits: Callable[[torch.nn.Module], Tensor],
    folder: Path,
    *,
    transposed: bool,
) -> None:
    """The files of an adapter mean the same in PEFT and here, and off or taken out it leaves the base, which `fresh` makes,
    bit for bit."""
    base, expected = logits(fresh()), logits(model)
    save_adapter(adapter, folder, transposed=transposed)

    assert relative_difference(logits(PeftModel.from_pretrained(fresh(), folder)), expected) <= 2e-6
    again = fresh()
    load_adapter(folder).inject_into(again)
    assert torch.equal(logits(again), expected)
    assert load_adapter(folder).digest() == adapter.digest()
    with disabled(model):
        assert torch.equal(logits(model), base)
    remove(model)
    assert torch.equal(logits(model), base)
    assert not any(module._forward_hooks for module in model.modules())


def updates(adapter: Adapter) -> dict[str, Tensor]:
    """ΔW [out, in] in float64 of every module, the plain way."""
    return {
        path: adapter.config.at(path).scale * factors.B.double() @ factors.A.double()
        for path, factors in adapter.layers.items()
    }
