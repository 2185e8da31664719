"""Rows of examples -> Batch: padded on the right to the longest, labels shifted to where they are predicted.

    input_ids   a b c d · ·        labels[t] = input_ids[t + 1] where weights[t + 1] > 0, else IGNORE
    weights       0 1 1            -> labels  - c d - - -

A row holds one example, or several packed one behind the other; the first token of an example is never a label, so no
example is predicted from the one before it.

Padding is known by its position, never by its id: it is token 0, which a row may hold as well. It stands to the right,
where a causal model never sees it, so rows of one example need no attention mask.

Rows that are classified have one label each and no tokens to predict. Encoders see in both directions, so there the
padding is told by a mask.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import rnn

from lora_cli.data.types import IGNORE, Batch, Example

Row = Sequence[Example]


def collate(rows: Sequence[Row], sources: Sequence[str] = ()) -> Batch:
    """The batch of at least one row. Where a row is packed, it tells the documents and the places of their tokens.

    With `sources`, it tells which of them each token is from.
    """
    if rows[0][0].label is not None:
        return _classified([example for [example] in rows], sources)
    shape = (len(rows), max(map(length, rows)))
    input_ids = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE)
    weights = torch.zeros(shape)
    for i, row in enumerate(rows):
        end = length(row)
        input_ids[i, :end] = torch.tensor([token for example in row for token in example.input_ids])
        weights[i, : end - 1] = torch.tensor([weight for example in row for weight in example.weights][1:])
        labels[i, : end - 1] = input_ids[i, 1:end].where(weights[i, : end - 1] > 0, IGNORE)
    positions = (labels != IGNORE).any(dim=0).nonzero().squeeze(1)
    batch = Batch(input_ids=input_ids, labels=labels, weights=weights, positions=positions)
    if any(len(row) > 1 for row in rows):
        batch |= _borders(rows, shape[1])
    return batch | {"sources": _from_sources(rows, shape[1], sources)} if sources else batch


def joined(batches: Sequence[Batch]) -> Batch:
    """The rows of several batches below each other, as one batch; what each counts is told apart by `sources`.

    The sources of each, or all of its tokens where it has none, become sources of the whole, in the order of the batches.
    Rows that are classified have none here: a row's label is its own.
    """
    if "attention_mask" in batches[0]:
        return _joined_rows(batches)
    width = max(batch["input_ids"].shape[1] for batch in batches)
    labels = _below([batch["labels"] for batch in batches], width, IGNORE)
    whole = Batch(
        input_ids=_below([batch["input_ids"] for batch in batches], width, 0),
        labels=labels,
        weights=_below([batch["weights"] for batch in batches], width, 0.0),
        positions=(labels != IGNORE).any(dim=0).nonzero().squeeze(1),
        sources=torch.block_diag(*(_sources(batch, width).flatten(1) for batch in batches)).view(-1, *labels.shape) > 0,
    )
    if any("documents" in batch for batch in batches):
        documents, places = zip(*(_documents(batch, width) for batch in batches), strict=True)
        whole |= {"documents": torch.cat(documents), "places": torch.cat(places)}
    return whole


def length(row: Row) -> int:
    return sum(len(example.input_ids) for example in row)


def blank(example: Example) -> Example:
    """The same tokens with nothing to learn: for a rank that has no row left and must still run its forward."""
    return replace(example, weights=[0.0] * len(example.weights))


def _classified(examples: Sequence[Example], sources: Sequence[str]) -> Batch:
    mask = _padded([torch.ones(len(example.input_ids), dtype=torch.int64) for example in examples])
    batch = Batch(
        input_ids=_padded([torch.tensor(example.input_ids) for example in examples]),
        labels=torch.tensor([example.label for example in examples]),
        weights=torch.tensor([example.items for example in examples]),
        attention_mask=mask,
    )
    if any(example.segments for example in examples):
        segments = [torch.tensor(example.segments or [0] * len(example.input_ids)) for example in examples]
        batch["token_type_ids"] = _padded(segments)
    if sources:
        of_source = [[example.row.source == source for example in examples] for source in sources]
        batch["sources"] = torch.tensor(of_source)
    return batch


def _joined_rows(batches: Sequence[Batch]) -> Batch:
    """Of batches that are classified."""
    width = max(batch["input_ids"].shape[1] for batch in batches)
    whole = Batch(
        input_ids=_below([batch["input_ids"] for batch in batches], width, 0),
        labels=torch.cat([batch["labels"] for batch in batches]),
        weights=torch.cat([batch["weights"] for batch in batches]),
        attention_mask=_below([batch["attention_mask"] for batch in batches], width, 0),
    )
    if any("token_type_ids" in batch for batch in batches):
        segments = [batch.get("token_type_ids", torch.zeros_like(batch["input_ids"])) for batch in batches]
        whole["token_type_ids"] = _below(segments, width, 0)
    return whole


def _borders(rows: Sequence[Row], width: int) -> dict[str, Tensor]:
    """`documents` and `places`, [batch, time]; the padding of a row counts as a document of its own."""
    sizes = [[len(example.input_ids) for example in row] + [width - length(row)] for row in rows]
    documents = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in sizes]
    places = [torch.cat([torch.arange(size) for size in row]) for row in sizes]
    return {"documents": torch.stack(documents), "places": torch.stack(places)}


def _from_sources(rows: Sequence[Row], width: int, sources: Sequence[str]) -> Tensor:
    """[sources, batch, time] bool: the tokens of each; a token stands where it is predicted from, as its label does."""
    found = torch.zeros((len(sources), len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        start = 0
        for example in row:
            end = start + len(example.input_ids)
            found[sources.index(example.row.source), i, start : end - 1] = True
            start = end
    return found


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """[batch, time], with zeros to the right."""
    return rnn.pad_sequence(list(rows), batch_first=True)


def _below(tensors: Sequence[Tensor], width: int, filling: float) -> Tensor:
    """[all rows, width]"""
    return torch.cat([F.pad(tensor, (0, width - tensor.shape[1]), value=filling) for tensor in tensors])


def _sources(batch: Batch, width: int) -> Tensor:
    """[sources, batch, width]: which tokens are of which; one source where nothing is told."""
    labels = batch["labels"]
    found = batch["sources"] if "sources" in batch else (labels != IGNORE).unsqueeze(0)
    return F.pad(found, (0, width - labels.shape[1])).float()


def _documents(batch: Batch, width: int) -> tuple[Tensor, Tensor]:
    """`documents` and `places` of rows padded to `width`: the new padding counts as a document of its own."""
    rows, time = batch["input_ids"].shape
    counted = torch.arange(width, device=batch["input_ids"].device).expand(rows, width)
    documents = batch["documents"] if "documents" in batch else torch.zeros_like(batch["input_ids"])
    places = batch["places"] if "documents" in batch else counted[:, :time]
    return (
        F.pad(documents, (0, width - time), value=time),
        torch.cat([places, counted[:, : width - time]], dim=1),
    )
