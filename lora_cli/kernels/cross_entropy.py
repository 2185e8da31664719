"""The loss behind a frozen head, without the logits of all tokens: a stretch of rows at a time.

The head is frozen, so the only gradient is that of the hidden states, [rows, hidden]. It is made in the forward, while
the stretch's logits are there, and nothing else is kept: logits [rows, vocabulary] of a whole batch are the largest
tensor of a plain step, and the loss makes three of them.

`torch.nn.functional.linear_cross_entropy` (torch 2.13) was measured beside it: SmolLM2-135M's head, 256 rows in float32,
forward and backward on one thread of a CPU. 0.6 s here and in torch's stretches of 256 rows, 0.75 s in its plain form,
8 s in the short stretches it chooses itself. It has no scale and no softcap, and for weights of rows makes its stretches twice.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_cli.kernels.products import product_type
from lora_cli.kernels.sizes import LOGITS_AT_ONCE


class Head(NamedTuple):
    """How a model makes logits of its last hidden states: softcap · tanh(scale · (h Wᵀ + bias) / softcap)."""

    weight: Tensor  # [vocabulary, hidden], frozen
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def head_cross_entropy(hidden: Tensor, head: Head, labels: Tensor, weights: Tensor) -> Tensor:
    """weight · −log p(label) of each row, in nats.

    hidden [rows, hidden], labels [rows] (any where the weight is 0), weights [rows] float32 -> [rows]
    """
    graded = torch.is_grad_enabled() and hidden.requires_grad
    return _HeadCrossEntropy.apply(hidden, head, labels, weights, graded)


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, labels: Tensor, weights: Tensor, graded: bool) -> Tensor:
        size = max(1, LOGITS_AT_ONCE[hidden.device.type] // len(head.weight))
        losses = torch.empty_like(weights)
        gradient = torch.empty_like(hidden) if graded else None
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            losses[part] = _stretch(
                hidden[part], head, labels[part], weights[part], None if gradient is None else gradient[part]
            )
        ctx.save_for_backward(gradient)
        return losses.mul_(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor | None, ...]:
        [gradient] = ctx.saved_tensors
        return gradient * d_losses.unsqueeze(1).to(gradient.dtype), None, None, None, None


def _stretch(hidden: Tensor, head: Head, labels: Tensor, weights: Tensor, gradient: Tensor | None) -> Tensor:
    """[rows] nats; with `gradient` [rows, hidden], d(Σ weight · nats)/d(hidden) is written there.

    In the memory of the logits stand, one after the other, their exponentials and their gradient.
    """
    kind = product_type(hidden, len(hidden))
    weight, bias = head.weight.to(kind), None if head.bias is None else head.bias.to(kind)
    logits = F.linear(hidden.to(kind), weight, bias).float()
    slope, place = None, labels.unsqueeze(1)
    if head.scale != 1:
        logits.mul_(head.scale)
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_()
        slope = logits.square().neg_().add_(1) if gradient is not None else None
        logits.mul_(head.softcap)
    logits.sub_(logits.amax(dim=1, keepdim=True))
    picked = logits.gather(1, place)
    exponentials = logits.exp_()
    sums = exponentials.sum(dim=1, keepdim=True)
    if gradient is not None:
        share = weights.unsqueeze(1) * head.scale
        d_logits = exponentials.mul_(share / sums).scatter_add_(1, place, -share)
        if slope is not None:
            d_logits.mul_(slope)
        gradient.copy_(d_logits.to(kind) @ weight)
    return (sums.log_() - picked).squeeze(1)
