"""Attention that keeps packed documents apart, on every architecture: explicit masks, or borders for flash kernels.

Many of transformers' models ignore position_ids when they build their masks, so the mask is made here and given whole.
"""

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)


def packed_arguments(model: "PreTrainedModel", documents: Tensor, positions: Tensor) -> dict[str, object]:
    """What a forward needs beside input_ids so that no token attends to another document.

    documents, positions: [batch, time]; the number of each token's document in its row, and its place in the document.
    """
    return PACKED[model.config._attn_implementation](model.config, documents, positions, model.dtype)


def packs(model: "PreTrainedModel") -> bool:
    """Whether rows can be packed on this model, proved on it; a notice says why not."""
    kind = model.config._attn_implementation
    if kind not in PACKED:
        log.warning("rows are not packed: with `model.attention: %s` documents can't be kept apart here", kind)
        return False
    if not keeps_documents_apart(model):
        log.warning("rows are not packed: packed documents see each other in this model")
        return False
    return True


@torch.no_grad()
def keeps_documents_apart(model: "PreTrainedModel") -> bool:
    """The proof, on two short documents: packed together they get the logits that each gets alone."""
    device = model.device
    ids = torch.randint(0, model.config.vocab_size, (1, 24), generator=torch.Generator().manual_seed(0)).to(device)
    documents = torch.tensor([[0] * 10 + [1] * 14], device=device)
    positions = torch.cat([torch.arange(10), torch.arange(14)]).unsqueeze(0).to(device)
    packed = model(input_ids=ids, use_cache=False, **packed_arguments(model, documents, positions)).logits
    alone = torch.cat([model(input_ids=part, use_cache=False).logits for part in (ids[:, :10], ids[:, 10:])], dim=1)
    error = (packed - alone).float().abs().max()
    tolerance = TOLERANCE[torch.bfloat16 if getattr(model, "is_quantized", False) else model.dtype]
    return bool(error <= tolerance * alone.float().abs().max())


# Of the largest logit; quantised layers round what they multiply. A document that is seen moves logits by a tenth of it and more
TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def _sdpa(config: "PretrainedConfig", documents: Tensor, positions: Tensor, dtype: torch.dtype) -> dict[str, object]:
    return {"attention_mask": _by_layer_type(config, documents, lambda mask: mask), "position_ids": positions}


def _eager(config: "PretrainedConfig", documents: Tensor, positions: Tensor, dtype: torch.dtype) -> dict[str, object]:
    def additive(mask: Tensor) -> Tensor:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    return {"attention_mask": _by_layer_type(config, documents, additive), "position_ids": positions}


def _flash(config: "PretrainedConfig", documents: Tensor, positions: Tensor, dtype: torch.dtype) -> dict[str, object]:
    """Borders instead of masks: the rows of the batch as one long row of documents."""
    flat = positions.flatten()
    starts = (flat == 0).nonzero().flatten().to(torch.int32)
    borders = torch.cat([starts, torch.tensor([flat.numel()], dtype=torch.int32, device=flat.device)])
    longest = int((borders[1:] - borders[:-1]).max())
    return {
        "attention_mask": None,
        "position_ids": positions,
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
    }


PACKED = {"sdpa": _sdpa, "eager": _eager, "flash_attention_2": _flash}


def _by_layer_type(config: "PretrainedConfig", documents: Tensor, form: Callable[[Tensor], Tensor]) -> object:
    """One [batch, 1, time, time] mask; or a mask for each type of layer, where a model has several."""
    full = block_mask(documents)
    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in types:
        return {"full_attention": form(full), "sliding_attention": form(block_mask(documents, window))}
    return form(full if window is None or types else block_mask(documents, window))


def block_mask(documents: Tensor, window: int | None = None) -> Tensor:
    """[batch, 1, time, time], True where a query (row) sees a key: same document, not later, within the window."""
    time = torch.arange(documents.shape[1], device=documents.device)
    distance = time[:, None] - time[None, :]
    seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    return (seen & (documents[:, :, None] == documents[:, None, :])).unsqueeze(1)
