"""Examples -> Batch: padded on the right to the longest, labels shifted to where they are predicted.

    input_ids   a b c d · ·        labels[t] = input_ids[t + 1] where weights[t + 1] > 0, else IGNORE
    weights       0 1 1            -> labels  - c d - - -

Padding is known by its position, never by its id: it is token 0, which a row may hold as well. It stands to the right,
where a causal model never sees it, so no attention mask is needed.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from lora_cli.data.types import IGNORE, Batch, Example


def collate(examples: Sequence[Example]) -> Batch:
    """The batch of at least one example."""
    shape = (len(examples), max(len(example.input_ids) for example in examples))
    input_ids = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE)
    weights = torch.zeros(shape)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = torch.tensor(example.input_ids)
        weights[row, : length - 1] = torch.tensor(example.weights[1:])
        labels[row, : length - 1] = input_ids[row, 1:length].where(weights[row, : length - 1] > 0, IGNORE)
    positions = (labels != IGNORE).any(dim=0).nonzero().squeeze(1)
    return Batch(input_ids=input_ids, labels=labels, weights=weights, positions=positions)


def blank(example: Example) -> Example:
    """The same tokens with nothing to learn: for a rank that has no row left and must still run its forward."""
    return replace(example, weights=[0.0] * len(example.weights))
