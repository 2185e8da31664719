"""Rules of thumb for what a recipe leaves `auto`, where nothing is trained or the base has no formula to plan with."""

import torch

from lora_cli.models.recompute import Recompute, recompute_of
from lora_cli.recipe.schema import Training
from lora_cli.train.layout import Layout

# Tokens of one forward: a GPU needs many to be busy; a CPU loses more to attention over long rows than it gains
TOKENS_PER_FORWARD = {"cpu": 512, "cuda": 16384}


# Logits are the largest tensor of a step: in the model's type, in float32, as probabilities, and as gradient
BYTES_A_LOGIT = 16
LOGITS_SHARE = 0.25  # of the free memory, once the base is loaded


def layout(
    settings: Training,
    *,
    longest: int,
    vocabulary: int,
    processes: int,
    device: torch.device,
    pack_to: int | None = None,
) -> Layout:
    """Rows a forward: the largest power of two that the step, and rows of the longest length, leave room for.

    With `pack_to`, rows are packed to as many tokens as a forward may have, at most `pack_to`; a longer example has a
    row of its own.
    """
    tokens = _tokens_a_forward(vocabulary, device)
    if pack_to is not None:
        row = min(pack_to, tokens)
        return Layout(_given(settings) or _power_of_two(tokens // max(row, longest)), row)
    per_device = -(-settings.global_batch_size // processes)
    return Layout(_given(settings) or _power_of_two(min(per_device, tokens // longest)))


def _given(settings: Training) -> int | None:
    return None if settings.micro_batch_size == "auto" else settings.micro_batch_size


def _power_of_two(most: int) -> int:
    return 1 << max(0, most.bit_length() - 1)


def _tokens_a_forward(vocabulary: int, device: torch.device) -> int:
    tokens = TOKENS_PER_FORWARD.get(device.type, TOKENS_PER_FORWARD["cpu"])
    if device.type != "cuda":
        return tokens
    free, _ = torch.cuda.mem_get_info(device)
    return min(tokens, int(free * LOGITS_SHARE) // (BYTES_A_LOGIT * vocabulary))


def gradient_checkpointing(settings: Training, device: torch.device) -> Recompute:
    """Where nothing can be predicted: every block where memory is scarce, which is on accelerators."""
    asked = recompute_of(settings.gradient_checkpointing)
    return int(device.type != "cpu") if asked is None else asked


def rehearses(device: torch.device) -> bool:
    """Whether the largest forward is tried before the first step.

    Where a device has memory of its own, that tells in the first minute what would end the run in the fourth hour. On a
    CPU it would tell nothing: the system promises more memory than it has, and kills who uses it.
    """
    return device.type != "cpu"
