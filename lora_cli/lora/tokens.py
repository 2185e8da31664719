"""Rows of the embedding that are trained beside the LoRA layers, for a few tokens: PEFT's `trainable_token_indices`.

    E[t] -> E[t] + (e′ − e)         for the listed tokens t; e: the frozen row, e′: the trained one, float32
    logits[t] -> h · e′             where the head is the same table; a head with a table of its own trains its own rows

The table itself is never written, copied or trained, so a few special tokens cost a few rows and not the vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_cli.errors import ModelError, Problem
from lora_cli.lora.shards import gathered, put
from lora_cli.lora.vocabulary import mean_row

NAME = "token_adapter"
ROWS = f"{NAME}.trainable_tokens_delta"  # PEFT's name; what it holds are the rows themselves


class TrainedTokens(nn.Module):
    """The trained rows of one table: a child of the embedding or head whose output they move."""

    def __init__(self, base: nn.Module, tokens: Sequence[int]) -> None:
        super().__init__()
        self.enabled = True
        rows = base.weight.detach()[list(tokens)].float()
        self.rows = nn.Parameter(rows.clone())
        self.register_buffer("start", rows.clone(), persistent=False)
        self.register_buffer("tokens", torch.tensor(tokens, device=rows.device), persistent=False)
        slots = torch.full((len(base.weight),), len(tokens), device=rows.device)  # the row behind the last is zero
        slots[self.tokens] = torch.arange(len(tokens), device=rows.device)
        self.register_buffer("slots", slots, persistent=False)
        self._base = (base,)  # in a tuple, so that it is no child

    @property
    def base(self) -> nn.Module:
        return self._base[0]

    def moved(self) -> Tensor:
        """[tokens, width] float32: the trained rows minus the frozen ones."""
        return gathered(self.rows) - self.start

    def move_looked_up(self, module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """A forward hook of an embedding. Some of them (Gemma's) scale what they look up by `embed_scale`."""
        if not self.enabled:
            return y
        table = F.pad(self.moved(), (0, 0, 0, 1))
        scale = getattr(self.base, "embed_scale", 1.0)
        return y + (F.embedding(self.slots[inputs[0]], table) * scale).to(y.dtype)

    def move_logits(self, module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """A forward hook of a head: hidden [..., width], logits [..., vocabulary]."""
        if not self.enabled:
            return y
        return y.index_add(-1, self.tokens, F.linear(inputs[0], self.moved().to(inputs[0].dtype)).to(y.dtype))

    def state(self) -> dict[str, Tensor]:
        """A copy of the trained rows: float32, on the CPU."""
        return {ROWS: gathered(self.rows.detach()).to("cpu", torch.float32, copy=True)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            put(self.rows, state[ROWS])


def tables(model: nn.Module) -> dict[str, nn.Module]:
    """The embedding, and a head with a table of its own, by path: what has a row for each token."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    named = {id(module): path for path, module in model.named_modules()}
    found = {named[id(embedding)]: embedding}
    if head is not None and head.weight is not embedding.weight:
        found[named[id(head)]] = head
    return found


def check_tokens(model: nn.Module, tokens: Sequence[int], taken: Sequence[str]) -> None:
    """Raise ModelError where a table is changed by `taken` modules too, or has no row for a token."""
    for path, table in tables(model).items():
        if both := next((other for other in taken if path == other or path.startswith(f"{other}.")), None):
            what = f"`lora.trainable_tokens` trains rows of {path}, and the adapter changes the whole of {both}"
            raise ModelError(Problem(what, fix="leave one of the two out: the whole has the rows in it"))
        if max(tokens) >= len(table.weight):
            what = f"`lora.trainable_tokens` names the token {max(tokens)}, and {path} has {len(table.weight)} rows"
            raise ModelError(Problem(what, fix="use the tokenizer that belongs to the base"))


def train_tokens(model: nn.Module, tokens: Sequence[int]) -> None:
    """Train these tokens' rows of each table. A head that shares the embedding's table is moved by the same rows."""
    head = model.get_output_embeddings()
    for table in tables(model).values():
        trained = TrainedTokens(table, tokens).train(table.training)
        table.add_module(NAME, trained)
        table.register_forward_hook(trained.move_logits if table is head else trained.move_looked_up)
        if head is not None and table is not head and head.weight is table.weight:
            head.register_forward_hook(trained.move_logits)


@torch.no_grad()
def begin_at_mean(model: nn.Module, new: Sequence[int]) -> None:
    """Start the trained rows of new tokens at the mean of the rows of those that were there before them."""
    for table in trained_tokens(model).values() if new else ():
        at = torch.isin(table.tokens, torch.tensor(new, device=table.tokens.device))
        table.rows[at] = mean_row(table.base.weight[: min(new)])


def trained_tokens(model: nn.Module) -> dict[str, TrainedTokens]:
    """By the path of the table that they belong to."""
    found = ((path, module) for path, module in model.named_modules() if isinstance(module, TrainedTokens))
    return {path.removesuffix(f".{NAME}"): module for path, module in found}


def remove_tokens(model: nn.Module) -> None:
    """Every module is what it was."""
    for path, trained in trained_tokens(model).items():
        own = (trained.move_looked_up, trained.move_logits)
        for module in model.modules():
            for number in [number for number, hook in module._forward_hooks.items() if hook in own]:
                del module._forward_hooks[number]
        delattr(model.get_submodule(path), NAME)
