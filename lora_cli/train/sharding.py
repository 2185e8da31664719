"""FSDP2 as Accelerate's users ask for it: `fsdp_config` of a launch profile, or what its launcher puts in the environment.

Both say the same thing under two names, and both are held to one table. No torch here: a profile is read before it.
"""

import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass

SWITCH = "ACCELERATE_USE_FSDP"
ON = ("1", "true", "yes", "on")


@dataclass(frozen=True)
class Key:
    """`values` are those that we do, in lower case; None takes any."""

    name: str  # in a profile
    variable: str  # in the environment
    values: tuple[str, ...] | None
    fix: str = "remove it"


VERSION = Key("fsdp_version", "FSDP_VERSION", ("2",), "set `fsdp_version: 2`: its shards may mix types, as LoRA needs")
BLOCKS = Key("fsdp_transformer_layer_cls_to_wrap", "FSDP_TRANSFORMER_CLS_TO_WRAP", None)
KEYS = (
    VERSION,
    BLOCKS,
    Key(
        "fsdp_auto_wrap_policy",
        "FSDP_AUTO_WRAP_POLICY",
        ("transformer_based_wrap",),
        "use TRANSFORMER_BASED_WRAP: a transformer block is what is sharded",
    ),
    Key(
        "fsdp_reshard_after_forward",
        "FSDP_RESHARD_AFTER_FORWARD",
        ("true",),
        "set it to true, or use `distributed_type: MULTI_GPU`: without it every process holds the whole base",
    ),
    Key(
        "fsdp_offload_params", "FSDP_OFFLOAD_PARAMS", ("false",), "set it to false; `model.quantize: nf4` saves memory"
    ),
    Key(
        "fsdp_activation_checkpointing",
        "FSDP_ACTIVATION_CHECKPOINTING",
        ("false",),
        "set it to false, and `training.gradient_checkpointing: true` in the recipe",
    ),
    Key("fsdp_activation_checkpointing_offload", "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", ("false",)),
    # An adapter is always gathered and saved whole, and the base's files are mapped, not copied: neither asks for more
    Key("fsdp_state_dict_type", "FSDP_STATE_DICT_TYPE", ("full_state_dict", "sharded_state_dict")),
    Key("fsdp_cpu_ram_efficient_loading", "FSDP_CPU_RAM_EFFICIENT_LOADING", ("true", "false")),
)
IN_PROFILE = {key.name: key for key in KEYS}


@dataclass(frozen=True)
class Sharding:
    """Base and adapter in shards, block by block; `blocks` are class names, where they are not the model's own choice."""

    blocks: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        """What tells a worker, in Accelerate's words."""
        return {SWITCH: "true", VERSION.variable: "2", BLOCKS.variable: ",".join(self.blocks)}


def class_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def is_on(variable: str, environment: Mapping[str, str] = os.environ) -> bool:
    return environment.get(variable, "").lower() in ON


def asked_for(environment: Mapping[str, str] = os.environ) -> Sharding | None:
    """What the launcher asks for; None where every process is to hold the whole base."""
    if not is_on(SWITCH, environment):
        return None
    return Sharding(class_names(environment.get(BLOCKS.variable, "")))


def not_done(environment: Mapping[str, str] = os.environ) -> Iterator[tuple[Key, str]]:
    """The keys whose values a launcher put in the environment and would not get. Accelerate's default version is 1."""
    if not is_on(SWITCH, environment):
        return
    for key in KEYS:
        value = environment.get(key.variable) or ("1" if key is VERSION else "")
        if value and key.values is not None and value.lower() not in key.values:
            yield key, value


@contextmanager
def hidden_from_accelerate(environment: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Inside the block Accelerate makes a plain data-parallel Accelerator: it would drop FSDP on a CPU without a word."""
    before = environment.pop(SWITCH, None)
    try:
        yield
    finally:
        if before is not None:
            environment[SWITCH] = before
