"""Out of memory: the same step again, in smaller forwards; the rows of a step stay the same, and so does its loss."""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Self

import torch

from lora_cli.data.types import Example
from lora_cli.errors import OutOfMemoryError, Problem
from lora_cli.train.events import OutOfMemory
from lora_cli.train.layout import Layout, Rows, halved
from lora_cli.train.optim import Parameters

MOMENTS = 2  # of AdamW, beside each trained parameter


class StartAgain(OutOfMemoryError):
    """Memory ran out on one process while the others wait for it inside of a forward, as shards make them: no process
    can go on. All leave, and start again from the last saved step with the forwards of the `shortage`."""

    def __init__(self, shortage: OutOfMemory) -> None:
        rows = shortage.micro_batch_size
        super().__init__(
            Problem(
                f"out of memory on worker {shortage.rank} in step {shortage.step}, while the others wait for it",
                fix=f"continue with `--resume --set training.micro_batch_size={rows} --allow-change training.micro_batch_size`; "
                "`lora train --processes N` does so by itself",
            )
        )
        self.shortage = shortage

    def as_json(self) -> str:
        return json.dumps(asdict(self.shortage))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        return cls(OutOfMemory(**json.loads(text)))


def smaller(layout: Layout, rows: Rows, forward: Rows, fitted: int) -> Layout:
    """Half the tokens a forward. Raises OutOfMemoryError where the forward that failed is one example already.

    `fitted` is the number of tokens of the largest forward that went well.
    """
    found = halved(layout, rows)
    if found is None:
        raise OutOfMemoryError(_too_long(max(forward, key=_length), fitted))
    return found


def free_memory() -> None:
    """Give back what a failed forward held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def rehearsed(parameters: Parameters) -> Iterator[None]:
    """For a forward and backward that only try whether memory is enough: the optimizer's share of it is taken, and what
    is drawn at random is drawn again afterwards."""
    moments = [torch.empty_like(parameter) for parameter in parameters.values() for _ in range(MOMENTS)]
    devices = {parameter.device for parameter in parameters.values() if parameter.is_cuda}
    with torch.random.fork_rng(devices=devices):
        yield
    del moments


def _too_long(example: Example, fitted: int) -> Problem:
    tokens = _length(example)
    fits = fitted if 0 < fitted < tokens else tokens // 2
    known = f"forwards of {fitted:,} tokens have fitted" if fits == fitted else "half of it may fit"
    return Problem(
        f"out of memory on a single row of {tokens:,} tokens; {known}",
        where=str(example.row),
        fix=f"set `training.gradient_checkpointing: true`, `data.max_length: {fits}`, or `model.quantize: nf4`",
    )


def _length(example: Example) -> int:
    return len(example.input_ids)
