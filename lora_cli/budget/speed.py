"""How long a forward and backward take, by floating-point operations, bytes moved, and what the host needs to launch them.

An estimate. Constants come from one place: LoRA steps of Llama shapes on an H100 (docs/plan.md lays them beside it).
"""

from dataclasses import dataclass

from lora_cli.budget.activations import FLASH
from lora_cli.budget.memory import base_bytes
from lora_cli.budget.step import Batch, Setup
from lora_cli.lora.targets import layer_index
from lora_cli.models.recompute import MLP, Recompute, is_recomputed

# Of the rate in the data sheet: bf16 products at these shapes reach 650 to 790 of an H100's 989 TFLOP/s
REACHED_FLOPS = 0.7
# Of the bandwidth in the data sheet: a copy reaches 3.0 of an H100's 3.35 TB/s
REACHED_BANDWIDTH = 0.9
# Bytes that norms, rotations, activation functions, adapters and additions move for each byte that is kept: in the
# forward, in the backward. Counted on Llama's operations, one kernel each
MOVED_FORWARD, MOVED_BACKWARD = 4, 8
MOVED_A_LOGIT = 48  # bytes, from the head's product to its gradient
# One block's forward and backward, launched kernel by kernel from Python: 117 ms for 16 blocks of a LoRA model
LAUNCH_SECONDS = 7.3e-3
ATTENTION_BACKWARD = 2.5  # times the forward (Dao 2023, section 3.1)


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, as its data sheet has it; a CPU launches nothing."""

    flops: float
    bandwidth: float  # bytes
    launches: bool = True


def seconds(setup: Setup, batch: Batch, recompute: Recompute, rates: Rates) -> float:
    """Of one forward and backward. The optimizer's step is small beside it."""
    again = recomputed_share(setup, recompute)
    products = operations(setup, batch, again) / (REACHED_FLOPS * rates.flops)
    moved = _moved(setup, batch, again) / (REACHED_BANDWIDTH * rates.bandwidth)
    launched = setup.shape.blocks * LAUNCH_SECONDS * (1 + again / 3) if rates.launches else 0.0
    return max(products + moved, launched)


def recomputed_share(setup: Setup, recompute: Recompute) -> float:
    """The share of the blocks' forward that is computed twice."""
    blocks = setup.shape.blocks
    if recompute == MLP:
        return _mlp_weights(setup) / max(1, _block_weights(setup))
    return sum(is_recomputed(i, recompute) for i in range(blocks)) / blocks


def operations(setup: Setup, batch: Batch, again: float) -> float:
    """Floating-point operations: a frozen weight has no gradient of its own, so 2 a weight and token in each direction."""
    forward = 2 * (_block_weights(setup) + (0 if setup.full else setup.trained))
    own_gradients = 2 * setup.trained
    attention = _attention(setup, batch)
    head = 4 * setup.shape.hidden * setup.shape.vocabulary * batch.trained
    return batch.tokens * (forward * (2 + again) + own_gradients) + attention * (1 + again + ATTENTION_BACKWARD) + head


def _attention(setup: Setup, batch: Batch) -> float:
    """Of a forward: two products of each query with each key; without a mask, half of them are left out."""
    c = setup.shape.config
    head = c.get("head_dim") or setup.shape.hidden // (c.get("num_attention_heads") or c["n_head"])
    queries = head * (c.get("num_attention_heads") or c["n_head"])
    every = 4 * queries * batch.row_length * batch.tokens * setup.shape.blocks
    return every if setup.how.masked and setup.how.attention != FLASH else every / 2


def _moved(setup: Setup, batch: Batch, again: float) -> float:
    kept = sum(block.whole.of(batch.rows, batch.row_length) for block in setup.blocks)
    passes = 2 + again
    weights = base_bytes(setup.shape, setup.quantised, setup.how.number)
    unpacked = 0 if setup.quantised is None else 2 * setup.how.number * _block_weights(setup)  # written and read
    logits = MOVED_A_LOGIT * setup.shape.vocabulary * batch.trained
    return kept * (MOVED_FORWARD * (1 + again) + MOVED_BACKWARD) + passes * (weights + unpacked) + logits


def _block_weights(setup: Setup) -> int:
    """Weights that a token meets in the blocks: of a mixture, those of the experts it is sent to."""
    c, linears = setup.shape.config, [x for x in setup.shape.linears if layer_index(x.path) is not None]
    inner = c.get("moe_intermediate_size") or c.get("intermediate_size") or 0
    experts = 3 * setup.shape.hidden * inner * c.get("num_experts_per_tok", 0) * setup.shape.blocks
    return sum(x.in_features * x.out_features for x in linears) + experts


def _mlp_weights(setup: Setup) -> int:
    attention = sum(x.in_features * x.out_features for x in setup.shape.linears if "att" in x.path)
    return _block_weights(setup) - attention
