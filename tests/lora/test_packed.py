"""Weights as GPTQ's and AWQ's checkpoints pack them, read back; and layers that no gradient passes through."""

import pytest
import torch
from layers import IN, OUT, Holder, frozen
from packed import LAYERS, AWQuantLinear, GPTQQuantLinear
from torch import nn

from lora_cli.errors import ModelError
from lora_cli.lora.inject import frozen_digest
from lora_cli.lora.weights import check_gradients, dense, is_quantised, weights_of

PACKED = [name for name in LAYERS if name != "HQQLinear"]


def weight() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(OUT, IN, generator=generator), torch.randn(OUT, generator=generator)


@pytest.mark.parametrize("name", PACKED)
def test_the_codes_are_read_as_they_were_before_packing(name):
    W, bias = weight()
    layer = LAYERS[name](W, bias)

    found = dense(layer)

    assert torch.equal(found, layer.W)
    assert (found - W).abs().max() < 0.3  # four bits
    assert is_quantised(layer)
    assert weights_of(Holder(layer))["proj"].shape == (OUT, IN)


@pytest.mark.parametrize("name", PACKED)
def test_what_a_layer_keeps_in_buffers_counts_as_its_frozen_weight(name):
    model = Holder(LAYERS[name](*weight()))
    before = frozen_digest(model)

    model.proj.qweight[0, 0] += 1

    assert frozen_digest(model) != before


@pytest.mark.parametrize("kind", [GPTQQuantLinear, AWQuantLinear])
def test_codes_in_the_order_of_a_kernel_or_of_another_width_are_not_guessed(kind):
    layer = kind(*weight())

    layer.bits = 3
    with pytest.raises(ValueError, match="with 3 bits can't be read"):
        dense(layer)
    layer.bits = 4
    layer.qweight = layer.qweight.view(-1)
    with pytest.raises(ValueError, match="in an order of its own"):
        dense(layer)


class Rounding(GPTQQuantLinear):
    """Multiplies whole numbers: nothing comes back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.round().detach()).requires_grad_()


def test_a_layer_that_no_gradient_passes_through_is_refused_by_name():
    model = nn.Sequential(*(frozen(name).proj for name in ("Linear", "Linear4bit", "Linear8bitLt", "AWQuantLinear")))
    check_gradients(model)

    with pytest.raises(
        ModelError, match=r"no gradient passes through proj, which is quantised \(Tensor in a Rounding\)"
    ):
        check_gradients(Holder(Rounding(*weight())))
