"""Tensors of which each process holds a shard (FSDP2), read and written as whole ones.

All processes call these functions together; a tensor that is whole on this process stays what it is.
"""

import sys
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


class InShards:
    """What a model whose parameters lie in shards can do beside (`train/sharded.py` makes it one)."""

    def run(self, act: Callable[..., T], *arguments: object) -> T:
        """As a forward of the model: what lies outside of its blocks is whole for as long as `act` is at work."""
        return act(*arguments)


def is_sharded(tensor: Tensor) -> bool:
    tensors = sys.modules.get("torch.distributed.tensor")  # half a second to import; without it nothing is sharded
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def gathered(tensor: Tensor) -> Tensor:
    """The tensor with the shards of all processes."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What of it lies on this process."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor of the parameter's shape on the parameter's device, in shards where the parameter is."""
    value = value.to(parameter.device)
    if not is_sharded(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    # every process has the whole value, so that none has to be sent
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def put(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter, in place."""
    local(parameter.detach()).copy_(local(laid_out_as(parameter.detach(), value)))
