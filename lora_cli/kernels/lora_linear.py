"""The low-rank product, in plain PyTorch: what a fused kernel will have to agree with."""

import torch.nn.functional as F
from torch import Tensor


def lora_update(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """scale · (x Aᵀ) Bᵀ:  x [..., in], A [r, in], B [out, r] -> [..., out], computed in x's dtype.

    A and B stay float32 masters; casting them (r·(in + out) numbers) is cheap, casting the activations is not.
    The scale goes to the narrow side, [..., r].
    """
    return F.linear(F.linear(x, A.to(x.dtype)) * scale, B.to(x.dtype))
