"""LoRA itself: a frozen linear layer with a trained low-rank update beside it.

         x [in]
        ┌──┴────────┐
        │           │ dropout
    W₀ (frozen)   A [r, in]      random at the start
        │         B [out, r]     zero at the start, so training begins at the base model
        │           │ × scale    alpha / r
        └────( + )──┘
         y [out]

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.

Four things vary, each on an axis of its own: the storage of W₀ (`weights.py`), the scale (`config.py`), how A and B
start (`init.py`), and DoRA's magnitude (below). The fifth, learning rates, is the optimizer's business.
"""

import torch
from torch import Tensor, nn

from lora_cli.kernels.lora_linear import lora_update
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.shards import gathered, put
from lora_cli.lora.weights import dense, storage_of


class LoRALinear(nn.Module):
    """Wraps a linear layer of any storage; never copies, changes or subclasses it.

        y = base(x) + scale · B A dropout(x)          A: [r, in]   B: [out, r]

    Where A and B start from the weight itself (PiSSA, OLoRA), `start_A` and `start_B` hold frozen copies of that start
    and their product is taken off again: the function begins at the base's, and the base need not be changed.
    """

    def __init__(self, base: nn.Module, config: LoRAConfig) -> None:
        super().__init__()
        self.base = base
        self.enabled = True
        self.scale = config.scale
        out_features, in_features = storage_of(base).shape(base)
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.zeros(config.r, in_features, device=device), requires_grad=not config.freeze_A)
        self.lora_B = nn.Parameter(torch.zeros(out_features, config.r, device=device))
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        self.dropout = nn.Dropout(config.lora_dropout)
        self.magnitude = nn.Parameter(_row_norm(base)) if config.use_dora else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]"""
        y = self.base(x)
        if not self.enabled:
            return y
        A, B = self.factors()
        update = lora_update(self.dropout(x), A, B, self.scale).to(y.dtype)
        return y + update if self.magnitude is None else self._dora(y, update)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] of the update as it acts: with the start taken off they are [2r, in] and [out, 2r]."""
        A, B = gathered(self.lora_A), gathered(self.lora_B)
        if self.start_A is None:
            return A, B
        return torch.cat([A, self.start_A]), torch.cat([B, -self.start_B], dim=1)

    def begin_at(self, A: Tensor, B: Tensor) -> None:
        """Start training from A and B; a B that is not zero is remembered and taken off in every forward."""
        with torch.no_grad():
            put(self.lora_A, A)
            put(self.lora_B, B)
            if B.any():
                self.start_A, self.start_B = gathered(self.lora_A).clone(), gathered(self.lora_B).clone()

    @property
    def weight(self) -> Tensor:
        """The frozen weight as stored: some models look at a projection's dtype or device."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def _dora(self, y: Tensor, update: Tensor) -> Tensor:
        """m · (W₀ + ΔW) / ‖W₀ + ΔW‖ as a correction of y; the norm is a constant to the gradient (DoRA, section 4.3)."""
        with torch.no_grad():
            norm = merged_weight(dense(self.base), *self.factors(), self.scale).norm(dim=1)
        gain = self.magnitude / norm
        without_bias = y if self.base.bias is None else y - self.base.bias.to(y.dtype)
        # 1 is taken off in float32: near 1, bfloat16 knows only every 1/128th
        return y + (gain - 1).to(y.dtype) * without_bias + gain.to(y.dtype) * update


def merged_weight(W: Tensor, A: Tensor, B: Tensor, scale: float, magnitude: Tensor | None = None) -> Tensor:
    """[out, in] float32: W + scale · B A; with a magnitude [out], its rows scaled to that length (DoRA, equation 5)."""
    merged = torch.addmm(W.float(), B.float(), A.float(), alpha=scale)
    return merged if magnitude is None else merged * (magnitude.float() / merged.norm(dim=1)).unsqueeze(1)


def _row_norm(base: nn.Module) -> Tensor:
    return dense(base).detach().float().norm(dim=1)
