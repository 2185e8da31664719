"""Supervised fine-tuning: the cross-entropy of the trained tokens."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from lora_cli.data.collate import joined
from lora_cli.data.types import IGNORE, Batch
from lora_cli.kernels.cross_entropy import head_cross_entropy
from lora_cli.models.attention import packed_arguments
from lora_cli.models.logits import frozen_head, last_hidden
from lora_cli.objectives.base import BY_SOURCE, Loss, by_source


def sft(model: nn.Module, batch: Batch) -> Loss:
    """Σ weight · −log p(label), in nats, over the labelled positions; logits are made for those positions alone, and
    never of all of them at once where the head is a frozen matrix.

    Padding stands to the right of every row, where a causal model can't see it; packed documents are kept apart.
    """
    head = frozen_head(model)
    at = _labelled(batch) if head else _columns(batch)
    labels, weights = batch["labels"][at].flatten(), batch["weights"][at].flatten()
    if head:
        states = last_hidden(model, **_inputs(model, batch))[at].flatten(0, -2)
        losses = head_cross_entropy(states, head, labels.clamp(min=0), weights)
    else:
        logits = model(**_inputs(model, batch), use_cache=False, logits_to_keep=batch["positions"]).logits
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=IGNORE, reduction="none") * weights
    if "sources" not in batch:
        return Loss(losses.sum(), {})
    return Loss(losses.sum(), {BY_SOURCE: by_source(losses, batch["sources"][:, *at].flatten(1))})


def sft_each(model: nn.Module, batches: Sequence[Batch]) -> list[Loss]:
    """The loss of each batch, of one forward over the rows of all: its sources are some of those of the whole."""
    sums = sft(model, joined(batches)).metrics[BY_SOURCE]
    counts = [len(batch["sources"]) if "sources" in batch else 1 for batch in batches]
    return [
        Loss(own.sum(), {BY_SOURCE: own} if "sources" in batch else {})
        for own, batch in zip(sums.split(counts), batches, strict=True)
    ]


def _inputs(model: nn.Module, batch: Batch) -> dict[str, object]:
    """Nobody holds them beside the forward: masks are large, and not needed while the loss is made."""
    apart = packed_arguments(model, batch["documents"], batch["places"]) if "documents" in batch else {}
    return {"input_ids": batch["input_ids"], **apart}


Index = tuple[slice | Tensor, ...]  # of [batch, time]


def _columns(batch: Batch) -> Index:
    """Every row at the positions where any of them has a label."""
    return slice(None), batch["positions"]


def _labelled(batch: Batch) -> Index:
    """The labelled positions themselves, in order. A GPU would have to be waited for: there, columns."""
    if batch["labels"].device.type != "cpu":
        return _columns(batch)
    return (batch["labels"] != IGNORE).nonzero(as_tuple=True)
