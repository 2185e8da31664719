"""LoRA itself: a frozen weight with a trained low-rank update beside it.

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
start (`init.py`), and DoRA's magnitude (below). The fifth, learning rates, is the optimizer's business. What x is and
how it meets a weight is a layer class's own: linear layers are here, `embedding.py`, `convolution.py` and `experts.py`
have the others, and `inject.py` the table.
"""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from lora_cli.kernels.lora_linear import lora_linear, lora_update
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.shards import gathered, put
from lora_cli.lora.stand_in import StandIn
from lora_cli.lora.weights import Weight, frozen_matrix


class LoRALayer(nn.Module):
    """What every layer class has: A [r, in] and B [out, r] of an update scale · B A of a frozen weight.

    Experts that share a parameter have [experts, r, in] and [experts, out, r]: the last two sides are the matrix's.

    Where A and B start as a part of the weight itself (PiSSA, OLoRA), `start_A` and `start_B` hold frozen copies of that start
    and their product is taken off again: the function begins at the base's, and the base need not be changed.
    """

    def __init__(self, weight: Weight, config: LoRAConfig) -> None:
        super().__init__()
        self.frozen = weight
        self.enabled = True
        self.r = config.r
        self.scale = config.scale
        out_features, in_features = weight.shape
        several = () if weight.count is None else (weight.count,)
        A = torch.zeros(*several, config.r, in_features, device=weight.tensor.device)
        self.lora_A = nn.Parameter(A, requires_grad=not config.freeze_A)
        self.lora_B = nn.Parameter(torch.zeros(*several, out_features, config.r, device=A.device))
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        self.magnitude = nn.Parameter(self.dense().detach().float().norm(dim=-1)) if config.use_dora else None

    def dense(self) -> Tensor:
        """[..., out, in]: the frozen weight, dequantised if need be."""
        return self.frozen.dense()

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] of the update as it acts: with the start taken off they are [2r, in] and [out, 2r]."""
        A, B = gathered(self.lora_A), gathered(self.lora_B)
        if self.start_A is None:
            return A, B
        return torch.cat([A, self.start_A], dim=-2), torch.cat([B, -self.start_B], dim=-1)

    def begin_at(self, A: Tensor, B: Tensor, *, take_off: bool = False) -> None:
        """Start training from A and B. With `take_off` they are remembered, and taken off in every forward.

        DoRA starts at the row norms of what the layer computes (DoRA, section 4.1).
        """
        with torch.no_grad():
            put(self.lora_A, A)
            put(self.lora_B, B)
            if take_off:
                self.start_A, self.start_B = gathered(self.lora_A).clone(), gathered(self.lora_B).clone()
            elif self.magnitude is not None and B.any():
                put(self.magnitude, (self.dense().float() + self.scale * B @ A).norm(dim=-1))


class LoRAModule(LoRALayer, StandIn):
    """A LoRA layer in the place of a module whose weight it is that gets an update."""

    trailing = 0  # how many sides of an output stand behind the one of `out`

    def __init__(self, weight: Weight, config: LoRAConfig) -> None:
        super().__init__(weight, config)
        self.base = weight.module
        self.dropout = nn.Dropout(config.lora_dropout)

    @abstractmethod
    def low_rank(self, x: Tensor) -> Tensor:
        """scale · B A dropout(x), of the shape of base(x) and near its number format."""

    def forward(self, x: Tensor) -> Tensor:
        """x as the base takes it -> y as the base gives it"""
        y = self.base(x)
        return self.added(x, y) if self.enabled else y

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """What the layer makes of y = base(x): the update is added to it."""
        update = self.low_rank(x).to(y.dtype)
        return y + update if self.magnitude is None else self._dora(y, update)

    def _dora(self, y: Tensor, update: Tensor) -> Tensor:
        """m · (W₀ + ΔW) / ‖W₀ + ΔW‖ as a correction of y; the norm is a constant to the gradient (DoRA, section 4.3)."""
        with torch.no_grad():
            norm = row_norms(merged_weight(self.dense(), *self.factors(), self.scale))
        gain = _before(self.trailing, self.magnitude / norm)
        bias = self.frozen.bias
        without_bias = y if bias is None else y - _before(self.trailing, bias.to(y.dtype))
        # 1 is taken off in float32: near 1, bfloat16 knows only every 1/128th
        return y + (gain - 1).to(y.dtype) * without_bias + gain.to(y.dtype) * update


class LoRALinear(LoRAModule):
    """Wraps a linear layer of any storage.

    y = base(x) + scale · B A dropout(x)          A: [r, in]   B: [out, r]
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]; in one function where the base does no more than multiply by its weight."""
        W = frozen_matrix(self.base) if self.enabled and self.magnitude is None else None
        if W is None or W.dtype != x.dtype:
            return super().forward(x)
        dropped = self.dropout(x) if self.training and self.dropout.p else None
        return lora_linear(x, W, self.base.bias, *self.factors(), self.scale, dropped=dropped)

    def low_rank(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]"""
        return lora_update(self.dropout(x), *self.factors(), self.scale)


def merged_weight(W: Tensor, A: Tensor, B: Tensor, scale: float, magnitude: Tensor | None = None) -> Tensor:
    """[out, in] float32: W + scale · B A; with a magnitude [out], its rows scaled to that length (DoRA, equation 5)."""
    merged = torch.addmm(W.float(), B.float(), A.float(), alpha=scale)
    return merged if magnitude is None else merged * (magnitude.float() / row_norms(merged)).unsqueeze(1)


def row_norms(W: Tensor) -> Tensor:
    """[out]: what DoRA divides by. A row of zeros (the embedding of a token that pads) has no direction, and stays zero."""
    return W.norm(dim=-1).clamp(min=torch.finfo(W.dtype).tiny)


def _before(trailing: int, channels: Tensor) -> Tensor:
    """[channels, 1, …], to meet an output whose channels have so many sides behind them."""
    return channels.view(-1, *(1,) * trailing)
