"""Adapters that take turns on one base in memory: nothing is loaded again, and no weight of the base is ever written.

switch(model, a); …; switch(model, b); …; switch(model, None)        the base, bit for bit
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lora_cli.lora.adapter import Adapter
from lora_cli.lora.inject import remove


def switch(model: nn.Module, adapter: Adapter | None) -> None:
    """Make the model act as the base with this adapter, whatever adapter it had before; None is the base alone.

    Raises ModelError for an adapter that doesn't fit; the model is the bare base then.
    """
    remove(model)
    if adapter is not None:
        adapter.inject_into(model)


@contextmanager
def switched(model: nn.Module, adapter: Adapter | None) -> Iterator[None]:
    """The model with this adapter inside the block, and the bare base after it."""
    switch(model, adapter)
    try:
        yield
    finally:
        remove(model)
