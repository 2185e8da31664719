"""LoRA on a convolution: one with the base's kernel into r channels, and one of a single point out of them.

    y = base(x) + scale · B * (A * dropout(x))        A: [r, in · kernel]   B: [out, r]

PEFT's shapes, with the sides of the kernel in a row: `A` is [r, in, k, k] there, and `B` [out, r, 1, 1].
"""

from torch import Tensor

from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.layer import LoRAModule
from lora_cli.lora.weights import Weight


class LoRAConvolution(LoRAModule):
    """Wraps a Conv1d, Conv2d or Conv3d, with its stride, padding and dilation."""

    def __init__(self, weight: Weight, config: LoRAConfig) -> None:
        if weight.module.groups > 1:
            raise ValueError(
                f"its {weight.module.groups} groups see a part of the channels each, and an update as PEFT shapes it sees "
                "all of them: no weight of this convolution could hold it merged"
            )
        super().__init__(weight, config)
        self.trailing = len(weight.kernel)

    def low_rank(self, x: Tensor) -> Tensor:
        """x: [batch, in, …] -> [batch, out, …]"""
        A, B = (factor.to(x.dtype) for factor in self.factors())
        kernel = A.unflatten(1, self.base.weight.shape[1:])
        # As the base convolves, padding mode and all
        narrow = self.base._conv_forward(self.dropout(x), kernel, None) * self.scale
        return (B @ narrow.flatten(-self.trailing)).unflatten(-1, narrow.shape[-self.trailing :])
