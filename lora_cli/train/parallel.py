"""The processes of a run: one Accelerator, whether this is the only process or one of torchrun's workers."""

import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, GradientAccumulationPlugin

from lora_cli.errors import FIRST_FAILED, DistributedError, Problem, RecipeError, StorageError, UserError
from lora_cli.lora.shards import is_sharded
from lora_cli.train.optim import Parameters
from lora_cli.train.sharding import hidden_from_accelerate, is_on, not_done

T = TypeVar("T")

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
FIX = "use `distributed_type: MULTI_GPU`, FSDP or NO, or start with `lora train --processes N`"

# One process may download the base while the others wait. From the first step on, `watch.py` is quicker
START_UP = timedelta(hours=2)

# What `accelerate launch` asks for through the environment, and would not get
NOT_SUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def make_accelerator() -> Accelerator:
    """On the GPUs where there are any, else on the CPU (gloo). Loads, steps and shards are ours: it neither casts nor
    accumulates, and knows nothing of FSDP.

    What `accelerate launch` sets in the environment changes neither; RecipeError where it asks for more than data parallel.
    """
    _check_environment()
    # torch has a new name for it, which Accelerate does not pass on yet
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    # The frozen base has no buffers that could drift apart, and every parameter gets a gradient in every step.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    with hidden_from_accelerate():
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="no",
            dynamo_backend="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[ddp, InitProcessGroupKwargs(timeout=START_UP)],
        )
    if accelerator.distributed_type not in SUPPORTED:
        raise _unsupported(accelerator.distributed_type.value)
    return accelerator


def agree(accelerator: Accelerator, values: Mapping[str, object]) -> None:
    """Raise DistributedError, on every process, that names the values in which a process differs from the first."""
    digests = [hashlib.sha256(repr(value).encode()).digest()[:8] for value in values.values()]
    mine = torch.tensor([[int.from_bytes(digest, "big", signed=True) for digest in digests]], device=accelerator.device)
    every = accelerator.gather(mine)  # [processes, values]
    differs = (every != every[0]).any(dim=0).tolist()
    if any(differs):
        names = ", ".join(name for name, different in zip(values, differs, strict=True) if different)
        raise DistributedError(
            Problem(
                f"the processes do not agree on {names}",
                fix="give every machine the same recipe, base and data, and an `output` on a disk that all of them share",
            )
        )


def sum_gradients(parameters: Parameters, accelerator: Accelerator) -> None:
    """Add up the gradients of all processes, in one message.

    An adapter's are small: nothing is gained by sending them while the backward runs, and a process that fails in it
    leaves no other waiting. Those of shards are added up in the backward.
    """
    if accelerator.num_processes == 1 or any(map(is_sharded, parameters.values())):
        return
    gradients = [parameter.grad for parameter in parameters.values()]
    summed = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
    for gradient, part in zip(gradients, summed.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def on_first(accelerator: Accelerator, act: Callable[[], T]) -> T | None:
    """What the first process does while the others wait; where it fails, they all raise, with its exit code."""
    result, failure = None, None
    if accelerator.is_main_process:
        try:
            result = act()
        except Exception as error:
            failure = error
    code = torch.tensor(_exit_code(failure), device=accelerator.device)
    if code := int(accelerator.reduce(code, "sum").item()):
        raise failure or _failed_elsewhere(code)
    return result


def _exit_code(failure: Exception | None) -> int:
    if failure is None:
        return 0
    if isinstance(failure, OSError):
        return StorageError.code
    return failure.code if isinstance(failure, UserError) else UserError.code


def _failed_elsewhere(code: int) -> UserError:
    kind = next((error for error in UserError.__subclasses__() if error.code == code), UserError)
    return kind(Problem(FIRST_FAILED, fix="put right what it names; continue with `--resume`"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def quiet_unless_first() -> None:
    """Notices come from one process, not from all of them."""
    if int(os.environ.get("RANK", 0)) > 0:
        logging.getLogger("lora_cli").setLevel(logging.ERROR)


def leave_group() -> None:
    """Close the process group, so that no worker leaves while another still waits for it."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _check_environment() -> None:
    """Before Accelerate reads it: it would import DeepSpeed, and drop FSDP on a CPU without a word."""
    for variable, name in NOT_SUPPORTED.items():
        if is_on(variable):
            raise _unsupported(name)
    if refused := list(not_done()):
        raise RecipeError(
            *(
                Problem(f"`{key.name}: {value}` of the launcher is not supported", where=key.variable, fix=key.fix)
                for key, value in refused
            )
        )
    if is_on("ACCELERATE_USE_CPU") and torch.cuda.is_available():
        raise RecipeError(
            Problem(
                "`use_cpu` of the launcher is not supported where GPUs are visible",
                where="ACCELERATE_USE_CPU",
                fix='hide them with CUDA_VISIBLE_DEVICES=""',
            )
        )


def _unsupported(name: str) -> RecipeError:
    return RecipeError(Problem(f"training with {name} is not supported", fix=FIX))
