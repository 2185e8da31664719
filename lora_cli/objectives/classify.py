"""Classification: the cross-entropy of each row's label, and what it got right, by label."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_cli.data.collate import joined
from lora_cli.data.types import Batch
from lora_cli.objectives.base import BY_SOURCE, Loss, by_source


def classify(model: nn.Module, batch: Batch) -> Loss:
    """Σ weight · −log p(label), in nats, over the rows; the metrics count rows by label, [labels]."""
    return loss_of(logits_of(model, batch), batch)


def classify_each(model: nn.Module, batches: Sequence[Batch]) -> list[Loss]:
    """The loss of each batch, of one forward over the rows of all."""
    rows = [len(batch["labels"]) for batch in batches]
    logits = logits_of(model, joined(batches)).split(rows)
    return [loss_of(own, batch) for own, batch in zip(logits, batches, strict=True)]


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """[rows, labels] float32"""
    # padding is known by its position; a decoder's head and RoBERTa's positions look for it by its token
    ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, model.config.pad_token_id)
    knows_segments = getattr(model.config, "type_vocab_size", 0) > 1
    segments = {"token_type_ids": batch["token_type_ids"]} if knows_segments and "token_type_ids" in batch else {}
    return model(input_ids=ids, attention_mask=batch["attention_mask"], **segments).logits.float()


def loss_of(logits: Tensor, batch: Batch) -> Loss:
    labels, weights = batch["labels"], batch["weights"]
    losses = F.cross_entropy(logits, labels, reduction="none")
    metrics = counts(logits.argmax(dim=1), labels, weights, logits.shape[1])
    if "sources" in batch:
        metrics[BY_SOURCE] = by_source((losses * weights).detach(), batch["sources"])
    return Loss(losses @ weights, metrics)


def counts(chosen: Tensor, labels: Tensor, weights: Tensor, size: int) -> dict[str, Tensor]:
    """Rows by label, [size]: those that have it, those that were given it, and those where the two are one."""
    none = torch.zeros(size, dtype=weights.dtype, device=weights.device)
    return {
        "actual": none.index_add(0, labels, weights),
        "chosen": none.index_add(0, chosen, weights),
        "right": none.index_add(0, labels, weights * (chosen == labels)),
    }


def accuracy_and_f1(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """The share of rows that got their label, and the mean of F1 over the labels that any row has or was given."""
    actual, chosen, right = sums["actual"], sums["chosen"], sums["right"]
    occurs = actual + chosen > 0
    f1 = 2 * right[occurs] / (actual + chosen)[occurs]
    return {"accuracy": float(right.sum() / actual.sum()), "macro_f1": float(f1.mean())}
