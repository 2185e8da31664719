"""Supervised fine-tuning: the cross-entropy of the trained tokens."""

import torch.nn.functional as F
from torch import nn

from lora_cli.data.types import IGNORE, Batch
from lora_cli.models.attention import packed_arguments
from lora_cli.objectives.base import BY_SOURCE, Loss


def sft(model: nn.Module, batch: Batch) -> Loss:
    """Σ weight · −log p(label), in nats, over the labelled positions; logits are made for those positions alone.

    Padding stands to the right of every row, where a causal model can't see it; packed documents are kept apart.
    """
    positions = batch["positions"]
    apart = packed_arguments(model, batch["documents"], batch["places"]) if "documents" in batch else {}
    logits = model(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=positions, **apart).logits
    labels = batch["labels"][:, positions].flatten()
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=IGNORE, reduction="none")
    weights = batch["weights"][:, positions].flatten()
    if "sources" not in batch:
        return Loss(losses @ weights, {})
    of_source = batch["sources"][:, :, positions].flatten(1).to(losses.dtype)
    return Loss(losses @ weights, {BY_SOURCE: of_source @ (losses * weights).detach()})
