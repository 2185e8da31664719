"""The grid of a base: where its weights could stand while an adapter learned beside them.

QLoRA trains on nf4(W), whose errors the adapter learns to live with, or even to mend. So it may be merged into W, or into
what nf4(W) stands for, stored in 16 bits; which of the two answers more as base(nf4) + adapter did is measured. Nearer
is not better: W without its rounding errors may lose less on rows that were held out, and so that is measured too.

    Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_cli.lora.inject import linears
from lora_cli.lora.weights import dense, is_quantised

ORIGINAL, NF4, AUTO = "original", "nf4", "auto"
TRAINED = "trained"  # base(nf4) + adapter, which is on no grid
TOLD_APART = 5e-5  # nats: losses are told to four decimals
BLOCK_SIZE = 64  # bitsandbytes' own, and transformers' too: weights that share a scale


@dataclass(frozen=True)
class Grid:
    """The weights of the modules at `paths` as nf4 gives them back: quantised from `dtype`, with double quantisation."""

    paths: frozenset[str]
    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module, dtype: torch.dtype) -> "Grid":
        """Of a model that was loaded in nf4."""
        return cls(frozenset(path for path, module in linears(model).items() if is_quantised(module)), dtype)

    def round(self, W: Tensor) -> Tensor:
        """[out, in] float32: the weight that the quantised one stands for."""
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        stored = W.to(self.dtype).contiguous()
        codes, state = quantize_4bit(stored, blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4")
        return dequantize_4bit(codes, state).view(W.shape).float()

    @torch.no_grad()
    def put_on(self, model: nn.Module) -> None:
        """Move the weights of a model that is not quantised onto the grid. In place."""
        found = linears(model)
        for path in self.paths:
            weight = dense(found[path])  # a view
            weight.copy_(self.round(weight))


@dataclass(frozen=True)
class Choice:
    """The grid that a merge stands on, and how far from base(nf4) + adapter each would be: KL in nats a position.

    `held_out` has the loss of each on `rows` held-out rows, and that of base(nf4) + adapter; None where there are none.
    """

    name: str
    kl: Mapping[str, float]
    asked: bool  # for by name, and not chosen by the KL
    held_out: Mapping[str, float] | None = None
    rows: int = 0

    @property
    def nearest(self) -> str:
        return min(self.kl, key=self.kl.__getitem__)

    @property
    def better(self) -> str | None:
        """The other grid, where its merge loses less on held-out rows than that of the nearest."""
        other = ORIGINAL if self.nearest == NF4 else NF4
        gains = self.held_out and self.held_out[self.nearest] - self.held_out[other] > TOLD_APART
        return other if gains else None
