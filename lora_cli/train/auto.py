"""What a recipe leaves `auto` and the machine decides: one function each; the resolved values are recorded."""

import torch

from lora_cli.recipe.schema import Training

# Tokens of one forward: a GPU needs many to be busy, a CPU few, and rows of like length then pad less
TOKENS_PER_FORWARD = {"cpu": 1024, "cuda": 16384}


# Logits are the largest tensor of a step: in the model's type, in float32, as probabilities, and as gradient
BYTES_A_LOGIT = 16
LOGITS_SHARE = 0.25  # of the free memory, once the base is loaded


def micro_batch_size(settings: Training, *, longest: int, vocabulary: int, processes: int, device: torch.device) -> int:
    """Rows a forward: the largest power of two that the step, and rows of the longest length, leave room for."""
    if settings.micro_batch_size != "auto":
        return settings.micro_batch_size
    per_device = -(-settings.global_batch_size // processes)
    tokens = TOKENS_PER_FORWARD.get(device.type, TOKENS_PER_FORWARD["cpu"])
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        tokens = min(tokens, int(free * LOGITS_SHARE) // (BYTES_A_LOGIT * vocabulary))
    room = tokens // max(1, longest)
    return 1 << max(0, min(per_device, room).bit_length() - 1)


def gradient_checkpointing(settings: Training, device: torch.device) -> bool:
    """On where memory is scarce, which is on accelerators; a CPU has more memory than time."""
    if settings.gradient_checkpointing != "auto":
        return settings.gradient_checkpointing
    return device.type != "cpu"
