"""The low-rank product, and a frozen linear layer with it, in plain PyTorch: what a fused kernel will have to agree with.

`lora_linear` is `F.linear(x, W, bias) + lora_update(x, A, B, scale)` as one autograd function. It is faster for what it
does not do:

    forward    the update is added into the output by the product that makes it; no scaled copy, no sum
    kept       x, which A's gradient needs, and x Aᵀ, r numbers a row; no copies of A and B in the base's type
    backward   dx = dy W and then, into the same memory, the update's share; no gradient of W

Linears that share an input (q, k and v; gate and up) each multiply it by their own A: one product for all of them was
at most 4 % faster in a block's linears alone (SmolLM2-135M's and Llama-3.2-1B's shapes, float32, one thread of a CPU),
which is too little of a step for what it would tie together. `torch.compile` of each block was no faster there (0.98 to
1.00 × the rate, after half a minute of compiling for four blocks): two thirds of a step are the products of the base.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_cli.kernels.products import product_type


def lora_update(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """scale · (x Aᵀ) Bᵀ:  x [..., in], A [r, in], B [out, r] -> [..., out], computed in x's dtype.

    A and B stay float32 masters; casting them (r·(in + out) numbers) is cheap, casting the activations is not.
    The scale goes to the narrow side, [..., r].
    """
    return F.linear(F.linear(x, A.to(x.dtype)) * scale, B.to(x.dtype))


def lora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, *, dropped: Tensor | None = None
) -> Tensor:
    """x Wᵀ + bias + scale · (x Aᵀ) Bᵀ:  x [..., in], W [out, in], A [r, in], B [out, r] -> [..., out], in x's dtype.

    W gets no gradient. With `dropped`, the update reads that instead of x: x behind a dropout.
    """
    return _LoRALinear.apply(x, dropped, W, bias, A, B, scale)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
    ) -> Tensor:
        kind = product_type(x, x.numel() // x.shape[-1])
        wide = x.to(kind)
        read = wide if dropped is None else dropped.to(kind)
        y = F.linear(wide, W.to(kind), None if bias is None else bias.to(kind))
        thin = _rows(F.linear(read, A.to(kind)))
        y.view(-1, y.shape[-1]).addmm_(thin, B.to(kind).T, alpha=scale)
        _, _, _, _, for_A, for_B, _ = ctx.needs_input_grad
        kept = x if dropped is None else dropped
        ctx.save_for_backward(W, A, B, kept if for_A else None, thin.to(x.dtype) if for_B else None)
        ctx.scale, ctx.kind, ctx.shape, ctx.dropped = scale, kind, x.shape, dropped is not None
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        W, A, B, kept, thin = ctx.saved_tensors
        for_x, for_dropped, _, for_bias, for_A, for_B, _ = ctx.needs_input_grad
        kind, given = ctx.kind, dy.dtype
        dy = _rows(dy).to(kind)
        d_thin = (dy @ B.to(kind)).mul_(ctx.scale)  # [rows, r]
        dx = d_dropped = None
        if for_x:
            dx = dy @ W.to(kind)
            if not ctx.dropped:
                dx.addmm_(d_thin, A.to(kind))
        if for_dropped:
            d_dropped = d_thin @ A.to(kind)
        return (
            None if dx is None else dx.to(given).view(ctx.shape),
            None if d_dropped is None else d_dropped.to(given).view(ctx.shape),
            None,
            dy.sum(0).to(given) if for_bias else None,
            (d_thin.T @ _rows(kept).to(kind)).to(A.dtype) if for_A else None,
            (dy.T @ thin.to(kind)).mul_(ctx.scale).to(B.dtype) if for_B else None,
            None,
        )


def _rows(x: Tensor) -> Tensor:
    """[..., features] -> [rows, features]"""
    return x.reshape(-1, x.shape[-1])
