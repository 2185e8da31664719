"""The processes of a run: one Accelerator, whether this is the only process or one of torchrun's workers."""

import logging
import os

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs


def make_accelerator() -> Accelerator:
    """On the GPUs where there are any, else on the CPU (gloo). Loads and steps are ours, so it neither casts nor accumulates."""
    # The frozen base has no buffers that could drift apart, and every parameter gets a gradient in every step.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    return Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[ddp])


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
