"""LoRA on experts: transformers keeps the weights of a layer's experts in one parameter, [experts, out, in].

    W_e + scale · B_e A_e        A: [experts, r, in]   B: [experts, out, r]

gpt-oss has its experts as [in, out]; here they are turned. PEFT's `target_parameters`, its ParamWrapper, does the same.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.layer import LoRALayer
from lora_cli.lora.stand_in import StandIn
from lora_cli.lora.weights import Weight


class LoRAExpertWeight(LoRALayer):
    """The update of one of the parameters. It stands in a LoRAExperts, under the parameter's name.

    There is no dropout: x is not at hand where a weight is changed, and each expert has its own rows of x.
    """

    def updated(self) -> Tensor:
        """The parameter as it acts, in its own form and number format."""
        W = self.dense()
        A, B = (factor.to(W.dtype) for factor in self.factors())
        merged = torch.baddbmm(W, B, A, alpha=self.scale)
        return merged.mT if self.frozen.transposed else merged


class LoRAExperts(StandIn):
    """Takes the place of a module of experts."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def add(self, weight: Weight, config: LoRAConfig) -> LoRAExpertWeight:
        """Raises ValueError for DoRA."""
        if config.use_dora:
            raise ValueError(
                "PEFT's format has no magnitudes for experts, so that nothing could read it with `use_dora`"
            )
        layer = LoRAExpertWeight(weight, config)
        setattr(self, weight.parameter, layer)
        return layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layers = {name: layer for name, layer in self.named_children() if isinstance(layer, LoRAExpertWeight)}
        updated = {name: layer.updated() for name, layer in layers.items() if layer.enabled}
        return functional_call(self.base, updated, args, kwargs) if updated else self.base(*args, **kwargs)
