"""Rows for tokens that a base has none for: its embedding and its head get longer tables.

    E [tokens, width]  ->  E′ [tokens + new, width]        the base's rows as they are, and for each new one their mean

A new token's logit is then a mean of logits: one among many, and not the largest (Hewitt 2021, "Initializing New Word
Embeddings for Pretrained Language Models"). Only modules change, never the base's own tensors, so that other models over
them stay what they are.
"""

import copy
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_cli.errors import ModelError, Problem
from lora_cli.lora.weights import is_quantised

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COUNTS = ("num_embeddings", "out_features")  # what modules call the number of rows


def make_room(model: "PreTrainedModel", tokens: Collection[int]) -> None:
    """Give embedding and head a row for each of `tokens`, of which they may have some or all already.

    Raises ModelError where other tokens would get rows with them, which nothing trains, and for a quantised table.
    """
    rows, needed = len(model.get_input_embeddings().weight), rows_for(tokens)
    if needed <= rows:
        return
    if between := set(range(rows, needed)) - set(tokens):
        what = f"rows of the token {needed - 1} are trained, and the base has {rows} rows: {min(between)} has none"
        raise ModelError(Problem(what, fix="use the base and the tokenizer that belong to each other"))
    made: dict[int, nn.Parameter] = {}  # by the tensor that it takes the place of: a tied head's is the embedding's
    for path, module in of_vocabulary(model).items():
        if is_quantised(module):
            raise ModelError(Problem(f"{path} is quantised, and gets no rows for new tokens", fix="use a 16-bit base"))
        model.set_submodule(path, _with_rows(module, needed, made))
    for counting in (model, model.config.get_text_config()):
        if hasattr(counting, "vocab_size"):
            counting.vocab_size = needed


def of_vocabulary(model: "PreTrainedModel") -> dict[str, nn.Module]:
    """What has a row for each token, by path: the embedding and the head, which may share them."""
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    return {path: module for path, module in model.named_modules() if module in both}


def rows_for(tokens: Collection[int]) -> int:
    """The rows of a table that has one for each of the tokens."""
    return max(tokens, default=-1) + 1


def longer(table: Tensor, rows: int) -> Tensor:
    """[rows, …] of the table's number format: the new rows are the mean of the old ones."""
    added = mean_row(table).to(table.dtype).expand(rows - len(table), *table.shape[1:])
    return torch.cat([table, added])


def mean_row(table: Tensor) -> Tensor:
    """float32: the mean over a table's rows."""
    return table.mean(dim=0, dtype=torch.float32)


def _with_rows(module: nn.Module, rows: int, made: dict[int, nn.Parameter]) -> nn.Module:
    """A copy of the module over the same tensors, but for its weight [tokens, …], and a head's bias [tokens]."""
    tensors = [*module.parameters(), *module.buffers()]
    new = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    for name, own in module.named_parameters(recurse=False):
        if id(own) not in made:
            made[id(own)] = nn.Parameter(longer(own.detach(), rows), requires_grad=False)
        setattr(new, name, made[id(own)])
    for count in COUNTS:
        if hasattr(new, count):
            setattr(new, count, rows)
    return new
