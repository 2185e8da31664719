"""Where processes agree between two forwards: to go on, to stop and save, or to do the step again with less memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum

import torch
from accelerate import Accelerator

from lora_cli.errors import is_out_of_memory


class Verdict(IntEnum):
    """What a process has to say; the gravest holds for all."""

    GO_ON = 0
    STOP = 1
    OUT_OF_MEMORY = 2


class Stopped(Exception):
    """The run was asked to stop. Every process raises it at the same place."""


class MemoryShort(Exception):
    """Memory ran out on `rank`, in its forward number `place` of the step. Every process raises it at the same place; but
    where `others_wait` for it inside of the forward, this one alone."""

    def __init__(self, rank: int, place: int, *, others_wait: bool = False) -> None:
        super().__init__(f"out of memory on rank {rank}, forward {place}")
        self.rank = rank
        self.place = place
        self.others_wait = others_wait


class Ranks:
    """The processes of a run. They meet on the CPU, where nobody waits for a device.

    Of a model that is `sharded` they meet inside of each forward and backward, too.
    """

    def __init__(
        self, accelerator: Accelerator, asked_to_stop: Callable[[], bool] = lambda: False, *, sharded: bool = False
    ) -> None:
        self.asked_to_stop = asked_to_stop
        self.sharded = sharded
        self.mine = accelerator.process_index
        self.count = accelerator.num_processes
        # NCCL knows no tensors on the CPU
        self.group = torch.distributed.new_group(backend="gloo") if self.count > 1 else None

    def go_on(self) -> None:
        """Raise Stopped, on all processes, where one was asked to stop. All have to call it equally often."""
        self._agree(Verdict.GO_ON, 0)

    @contextmanager
    def together(self, place: int) -> Iterator[None]:
        """A forward and backward that may run out of memory on one process; then all go on, or all raise the same."""
        verdict = Verdict.GO_ON
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if self.sharded:  # nobody hears a question
                raise MemoryShort(self.mine, place, others_wait=True) from None
            verdict = Verdict.OUT_OF_MEMORY
        self._agree(verdict, place)

    def _agree(self, verdict: Verdict, place: int) -> None:
        if verdict is Verdict.GO_ON and self.asked_to_stop():
            verdict = Verdict.STOP
        gravest, rank = divmod(self._largest(verdict * self.count + self.mine), self.count)
        if gravest == Verdict.OUT_OF_MEMORY:
            raise MemoryShort(rank, place)
        if gravest == Verdict.STOP:
            raise Stopped

    def _largest(self, number: int) -> int:
        if self.group is None:
            return number
        largest = torch.tensor(number)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, self.group)
        return int(largest.item())
