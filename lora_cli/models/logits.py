"""How a model makes logits of its last hidden states, for a loss that never has them all: one row an architecture.

    hidden states  ->  head, a frozen linear layer  ->  · scale  ->  cap

Architectures that are not in the table, and heads that are adapted, trained, quantised or in shards, make their logits
themselves. tests/laws/test_lean_step.py holds every row to the model's own logits.
"""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from lora_cli.kernels.cross_entropy import Head
from lora_cli.lora.shards import is_sharded

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# The config's keys of what the logits are multiplied by, divided by, and capped with; most have none of them
PLAIN = (None, None, None)
ARCHITECTURES: dict[str, tuple[str | None, str | None, str | None]] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "phi", "phi3"), PLAIN),
    **dict.fromkeys(("olmo2", "smollm3", "stablelm", "falcon", "gpt2", "gpt_neox", "gptj", "opt"), PLAIN),
    "granite": (None, "logits_scaling", None),
    **dict.fromkeys(("cohere", "cohere2"), ("logit_scale", None, None)),
    **dict.fromkeys(("gemma2", "gemma3_text"), (None, None, "final_logit_softcapping")),
}


def frozen_head(model: "PreTrainedModel") -> Head | None:
    """What makes the logits of `last_hidden`; None where the model has to make them itself."""
    keys = ARCHITECTURES.get(model.config.model_type)
    layer = model.get_output_embeddings()
    if keys is None or type(layer) is not nn.Linear or layer.weight.requires_grad or is_sharded(layer.weight):
        return None
    if layer._forward_hooks:  # its bias, or the rows of some tokens, are trained
        return None
    times, by, cap = (_value(model.config, key) for key in keys)
    return Head(layer.weight, layer.bias, (times or 1.0) / (by or 1.0), cap)


def last_hidden(model: "PreTrainedModel", **inputs: object) -> Tensor:
    """[batch, time, hidden]: what the head reads."""
    return model.base_model(**inputs, use_cache=False).last_hidden_state


def _value(config: "PretrainedConfig", key: str | None) -> float | None:
    return None if key is None else getattr(config, key)
