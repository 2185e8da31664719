"""How many bytes of tensors are alive, while something runs."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class TensorMemory(TorchDispatchMode):
    """`peak` is the most bytes of tensors that were alive at once, by their storages."""

    def __enter__(self):
        self.alive, self.peak = {}, 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in (*args, result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: found for key, found in self.alive.items() if not found[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result
