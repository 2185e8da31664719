"""LoRA on an embedding: the table's row of each token, and a low-rank row beside it.

    y = E[t] + scale · B A[:, t]        E: [tokens, width] frozen    A: [r, tokens]   B: [width, r]

Tied weights: where the head is the same tensor as the table, the update acts on the lookup alone, as in PEFT. The frozen
tensor stays one; a merge gives the head a weight of its own.
"""

from torch import Tensor
from torch.func import functional_call

from lora_cli.lora.layer import LoRAModule


class LoRAEmbedding(LoRAModule):
    """Wraps an embedding of any class that is linear in its table (Gemma's scales it, OPT's shifts the positions)."""

    def low_rank(self, x: Tensor) -> Tensor:
        """x: token ids [...] -> [..., width]. No dropout: an id has no part that could be left out (as in PEFT)."""
        A, B = self.factors()
        looked_up = functional_call(self.base, {"weight": A.T}, (x,))  # [..., r], by whatever rule the table is read
        return (looked_up @ B.T) * self.scale
