"""What a step really needs of memory: the summed bytes of live tensors on a CPU, the allocator's peak on CUDA."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Peak:
    """The largest number of bytes that were alive at once; known when the measured block has ended."""

    bytes: int = 0
    before: int = 0  # the allocator's peak up to the block, which measuring makes it forget


@contextmanager
def measured(device: torch.device, held: Iterable[Tensor]) -> Iterator[Peak]:
    """Measure the block; `held` are the tensors that are there already (a CPU has no allocator that knows them)."""
    peak = Peak()
    if device.type == "cuda":
        peak.before = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
    else:
        with _LiveTensors(held) as live:
            yield peak
        peak.bytes = live.peak


class _LiveTensors(TorchDispatchMode):
    """Sums the storages of all tensors that operations return, until nothing refers to them any more.

    What a kernel allocates and frees inside of itself is not seen.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.storages: dict[int, weakref.ref] = {}
        for tensor in held:
            self._count(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.storages or storage.device.type == "meta":
            return

        def gone(_: weakref.ref) -> None:
            self.now -= size
            del self.storages[key]

        self.storages[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
