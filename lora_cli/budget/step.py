"""The peak memory of a training step, in bytes, from the shape of the base and of the batch alone.

weights      the frozen base as it is stored, or float32     activations  what blocks keep for their backward pass
adapter      float32 masters                                 logits       of the trained positions, while the loss is made
gradients    float32                                         working      what one block needs while it is computed again
optimizer    the state of each trained parameter                          and passed backwards
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from lora_cli.budget.activations import (
    EAGER,
    FLASH,
    Adapter,
    BlockMemory,
    How,
    Kept,
    block_memory,
    last_norm,
    stretches,
)
from lora_cli.budget.memory import FP32, base_bytes
from lora_cli.budget.params import Budget, Whole, budget_of
from lora_cli.budget.quantised import Quantised
from lora_cli.budget.shapes import Linear, ModelShape
from lora_cli.kernels.sizes import ENOUGH_ROWS
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.targets import layer_index
from lora_cli.models.recompute import EVERY_BLOCK, MLP, NOTHING, Recompute, is_recomputed

# The loss and its gradient, in float32. Of all logits at once: log-probabilities, their gradient, and the logits'
BYTES_A_LOGIT = 3 * FP32
# Of a stretch: the logits, in whose place their gradient is made, beside it in the base's type; and the slope of a cap
BYTES_IN_A_STRETCH, BYTES_OF_A_SLOPE = FP32, FP32
GRADIENTS_AT_ONCE = 2
NORMS_GRADIENT = 5  # vectors in float32 that stand side by side while a norm in float32 is passed backwards
TWO_ATTENTIONS = ("gemma2", "gemma3_text")  # to all tokens before, and to those in a window
WEIGHTED_IN_FLOAT32 = ("mixtral",)  # the outputs of experts; others weight them in the model's type
INDEX = 8  # bytes of a number that says where to look
# Bytes of state a trained parameter: two moments in float32, or in 8 bits with a scale a block of 256
OPTIMIZER_BYTES = {"adamw": 8.0, "paged_adamw": 8.0, "adamw_8bit": 2.03, "paged_adamw_8bit": 2.03}


@dataclass(frozen=True)
class Setup:
    """What is trained and how, whatever the batch."""

    shape: ModelShape
    adapted: tuple[Linear, ...]
    config: LoRAConfig
    how: How
    quantised: Quantised | None = None  # how linear layers are stored; None: as plain numbers
    optimizer: str = "adamw"
    full: bool = False  # every weight is trained, and float32; `adapted` are then all linears, with r = 0
    biases: int | None = None  # numbers trained in biases; None: those of `adapted`, where the config has them trained
    tokens: int = 0  # whose rows are trained, in each table

    @property
    def trained(self) -> int:
        return self.shape.parameters if self.full else self.budget.trainable

    @property
    def weight_bytes(self) -> int:
        """As the base is loaded: where its weights are trained, they are masters."""
        return FP32 * self.trained if self.full else base_bytes(self.shape, self.quantised, self.how.number)

    @cached_property
    def budget(self) -> Budget:
        rows = [Whole("rows of tokens", self.rows_of_tokens, False)] if self.tokens else []
        return budget_of(self.adapted, self.shape.parameters, self.config, rows, biases=self.biases)

    @property
    def tables(self) -> int:
        """The embedding, and a head that has a table of its own."""
        return 1 + any(not linear.tied for linear in self._heads)

    @property
    def rows_of_tokens(self) -> int:
        """The numbers in them."""
        width = next((linear.in_features for linear in self._heads), self.shape.hidden)
        return self.tokens * self.tables * width

    @property
    def _heads(self) -> list[Linear]:
        return [linear for linear in self.shape.linears if linear.path in self.shape.head]

    @cached_property
    def blocks(self) -> tuple[BlockMemory, ...]:
        """In the model's order; a gradient reaches the blocks behind the first adapter."""
        by_block: dict[int, dict[str, Adapter]] = {}
        for linear in self.adapted:
            adapter = Adapter(self.config.at(linear.path).r, linear.in_features, linear.out_features)
            by_block.setdefault(self._place(linear), {})[_inside(linear.path)] = adapter
        first = -1 if self.tokens else 0 if self.every_bias else min(by_block)
        parts = stretches(self.shape.model_type, self.shape.config, self.how)
        return tuple(
            block_memory(
                parts, by_block.get(i, {}), self.how, self.shape.hidden, reached=i > first, biased=self.every_bias
            )
            for i in range(self.shape.blocks)
        )

    def _place(self, linear: Linear) -> int:
        """The number of its block; -1 before the first, and their number behind the last."""
        index = layer_index(linear.path)
        behind = self.shape.blocks if linear.path in self.shape.head else -1
        return behind if index is None else index

    @property
    def in_stretches(self) -> bool:
        """Whether the loss never has all logits: the head is a frozen matrix, and nothing moves what it gives."""
        adapted = any(linear.path in self.shape.head for linear in self.adapted)
        moved = self.tokens > 0 or (self.every_bias and any(linear.bias for linear in self._heads))
        return self.how.logits_at_once is not None and not self.full and not adapted and not moved

    @property
    def every_bias(self) -> bool:
        return self.config.bias == "all"

    @property
    def capped(self) -> bool:
        return bool(self.shape.config.get("final_logit_softcapping"))

    @property
    def lean(self) -> bool:
        """Whether a linear with its adapter is one function."""
        return not self.how.use_dora and self.quantised is None and not self.full

    @property
    def copied(self) -> int:
        """Bytes of what is trained in the type of the products that are kept from the forward: of A and B, by what is not
        one function a layer."""
        if self.how.number == FP32:
            return 0
        return self.how.number * (self.trained if self.full else 0 if self.lean else self.budget.low_rank)

    @cached_property
    def widest(self) -> int:
        """Features of the widest vector inside a block that a gradient is made of."""
        down = next(part for part in reversed(self.shape.linears) if layer_index(part.path) is not None)
        return max(down.in_features, down.out_features)

    @cached_property
    def largest_weight(self) -> int:
        return max(x.in_features * x.out_features for x in self.shape.linears if x.path not in self.shape.head)


@dataclass(frozen=True)
class Batch:
    """One forward: `rows` of `row_length` tokens, and at how many positions of them all there is something to learn."""

    rows: int
    row_length: int
    trained: int

    @property
    def tokens(self) -> int:
        return self.rows * self.row_length


@dataclass(frozen=True)
class StepMemory:
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    working: int

    @property
    def total(self) -> int:
        return self.standing + self.activations + self.logits + self.working

    @property
    def standing(self) -> int:
        """What is there whatever the batch."""
        return self.weights + self.adapter + self.gradients + self.optimizer


def step_memory(setup: Setup, batch: Batch, recompute: Recompute) -> StepMemory:
    """The peak: either while the loss is made, or while one of the blocks is passed backwards, whichever is more."""
    kept = list(_kept_by_blocks(setup, batch, recompute))
    masks, logits = _masks(setup, batch), _logits(setup, batch)
    peak = (masks + sum(kept) + _behind_the_blocks(setup, batch), logits, 0.0)
    for i, block in enumerate(setup.blocks):
        again = _recomputed(i, recompute)
        inside = _again(block, again).of(batch.rows, batch.row_length)
        peak = max(peak, (masks + sum(kept[: i + 1]), 0.0, inside + _backward(setup, block, batch, again)), key=sum)
    activations, logits, working = map(round, peak)
    return StepMemory(*_standing(setup), activations, logits, working)


def _standing(setup: Setup) -> tuple[int, int, int, int]:
    """Weights, adapter, gradients, optimizer."""
    trained = setup.trained
    adapter = 0 if setup.full else FP32 * setup.budget.stored + _beside_rows(setup)
    state = round(OPTIMIZER_BYTES[setup.optimizer] * trained)
    return setup.weight_bytes, adapter + setup.copied, FP32 * trained, state


def _beside_rows(setup: Setup) -> int:
    """Where rows of tokens are trained: what they were at the start, and which row each token of a table has."""
    if not setup.tokens:
        return 0
    return FP32 * setup.rows_of_tokens + INDEX * setup.tables * setup.shape.vocabulary


def kept_bytes(setup: Setup, batch: Batch, recompute: Recompute) -> float:
    """What blocks and last norm keep of a forward, until the backward pass asks for it."""
    return sum(_kept_by_blocks(setup, batch, recompute)) + _behind_the_blocks(setup, batch)


def _kept_by_blocks(setup: Setup, batch: Batch, recompute: Recompute) -> Iterator[float]:
    for i, block in enumerate(setup.blocks):
        yield _kept(block, _recomputed(i, recompute)).of(batch.rows, batch.row_length)


def _recomputed(number: int, recompute: Recompute) -> Recompute:
    """What of the block of this number is computed again: nothing, its MLP, or all of it."""
    if recompute == MLP:
        return MLP
    return EVERY_BLOCK if is_recomputed(number, recompute) else NOTHING


def _kept(block: BlockMemory, again: Recompute) -> Kept:
    return {NOTHING: block.whole, MLP: block.without_mlp, EVERY_BLOCK: block.entry}[again]


def _again(block: BlockMemory, again: Recompute) -> Kept:
    """What is there beside what was kept once it has been computed again."""
    return {NOTHING: Kept(), MLP: block.mlp_again, EVERY_BLOCK: block.again}[again]


def _masks(setup: Setup, batch: Batch) -> float:
    """What all blocks read of which token sees which: for each kind of attention a number a pair, or a byte for kernels."""
    how = setup.how
    if not how.masked or how.attention == FLASH:
        return 0
    kinds = 2 if setup.shape.model_type in TWO_ATTENTIONS else 1
    return kinds * (how.number if how.attention == EAGER else 1) * batch.tokens * batch.row_length


def _behind_the_blocks(setup: Setup, batch: Batch) -> float:
    """The last norm's input, and of the loss the gradient of the states it reads: where the model makes all logits, the
    log-probabilities come instead (`_logits`), and what a cap keeps of them. Rows of tokens keep what they are looked up
    by, and the states that the head reads.
    """
    norm = last_norm(setup.shape.model_type, setup.shape.hidden, setup.how).of(batch.rows, batch.row_length)
    if setup.in_stretches:
        return norm + setup.how.number * setup.shape.hidden * batch.trained
    capped = setup.shape.vocabulary * batch.trained if setup.capped else 0
    of_rows = setup.shape.hidden * batch.trained if setup.tokens else 0
    return norm + setup.how.number * (capped + of_rows) + (INDEX * batch.tokens if setup.tokens else 0)


def _logits(setup: Setup, batch: Batch) -> float:
    """While the loss is made: of a stretch, with the states that the head reads, and their gradient by it."""
    how, hidden, vocabulary = setup.how, setup.shape.hidden, setup.shape.vocabulary
    if not setup.in_stretches:
        return BYTES_A_LOGIT * vocabulary * batch.trained
    rows = min(batch.trained, max(1, how.logits_at_once // vocabulary))
    widened = how.widened and rows >= ENOUGH_ROWS
    narrow = how.number if how.number < FP32 and not widened else 0
    a_logit = BYTES_IN_A_STRETCH + narrow + (BYTES_OF_A_SLOPE if setup.capped else 0)
    copies = FP32 * hidden * (vocabulary + rows) if widened else 0  # of the head, and of a stretch's gradient
    return a_logit * vocabulary * rows + copies + 2 * how.number * hidden * batch.trained


def _backward(setup: Setup, block: BlockMemory, batch: Batch, again: Recompute) -> float:
    """Gradients that stand side by side while the widest part of a block is passed backwards, and a weight unpacked.
    `again` tells what of the block has been computed again by then.

    Where a norm in float32 ends the block, that is passed first, before an MLP is computed again. Where attention keeps
    the probabilities of all pairs, theirs come when what is kept behind it is free again.
    """
    hidden, narrow = setup.shape.hidden, 2 * setup.how.number * setup.shape.hidden
    in_norm = NORMS_GRADIENT * FP32 * hidden if block.ends_in_norm and again != MLP else 0
    in_mlp = _in_mlp(setup, again)
    pairs = GRADIENTS_AT_ONCE * FP32 * block.probabilities * batch.row_length
    in_attention = pairs - block.behind_attention.token
    unpacked = 0 if setup.quantised is None else setup.how.number * setup.largest_weight
    wide = batch.tokens * (narrow + max(in_norm, in_mlp, in_attention))
    return max(wide + unpacked, _widened(setup, batch, narrow))


def _in_mlp(setup: Setup, again: Recompute) -> float:
    """Bytes a token of two gradients of the widest vector; of a mixture, what its experts take."""
    c, number = setup.shape.config, setup.how.number
    if not (experts := c.get("num_experts_per_tok")):
        return GRADIENTS_AT_ONCE * setup.widest * number
    weighted = FP32 if setup.shape.model_type in WEIGHTED_IN_FLOAT32 else number
    inner = experts * (c.get("moe_intermediate_size") or c["intermediate_size"])
    outputs, entry = experts * c["hidden_size"], c["hidden_size"] if again == EVERY_BLOCK else 0
    return max(
        (2 * weighted + number) * outputs + number * entry if again != NOTHING else 0,  # at the end of its forward
        3 * weighted * outputs,  # as the outputs, weighted in a type of their own, are put in order
        number * (outputs + 2 * inner),  # in the projection down
        number * (3 * inner - outputs),  # in the product of gate and up: the outputs are free again
    )


def _widened(setup: Setup, batch: Batch, narrow: int) -> float:
    """Where products are made in float32: the gradients on both sides of the adapted linear that reads the widest vector,
    and beside them its weight, or later its input with the gradient as it is handed on.
    """
    if not (setup.how.widened and setup.lean):
        return 0.0
    linear = max(setup.adapted, key=lambda linear: linear.in_features)
    gradients = narrow + FP32 * (linear.in_features + linear.out_features)
    later = (FP32 + setup.how.number) * linear.in_features
    return batch.tokens * gradients + max(FP32 * linear.in_features * linear.out_features, batch.tokens * later)


def _inside(path: str) -> str:
    """The path below the block: `self_attn.q_proj` of `model.layers.3.self_attn.q_proj`."""
    parts = path.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[place + 1 :])
