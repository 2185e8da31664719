"""An adapter that completes a quantised base (LoftQ), and what it is on the base in any other storage.

    trained on the quantised base   Q + scale · B A            B A begins at the best part of W − Q
    on any other, such as W         W + scale · (B A − B₀ A₀)  what training has changed; W needs no completion

So a run that completes its base keeps the start, A₀ and B₀, as an adapter of its own in the folder `start/`.
"""

from dataclasses import replace
from pathlib import Path

import torch

from lora_cli.errors import ModelError, Problem
from lora_cli.lora.adapter import Adapter, Factors
from lora_cli.lora.peft_format import WEIGHTS, load_adapter, load_alive

START = "start"


def load_for(folder: Path, quantize: str = "none", *, alive: bool = True) -> Adapter:
    """As `load_adapter`: the adapter as it acts on a base that is held as `quantize` (`model.quantize`) says.

    One that must be `alive` is refused with DivergedError where it does nothing.

    Raises ModelError where it completes another storage, and the start that would have to be taken off is not there.
    """
    adapter = load_alive(folder) if alive else load_adapter(folder)
    if adapter.completes in (None, quantize):
        return adapter
    # a checkpoint lies two folders below its run
    starts = (place / START for place in (folder, folder.absolute().parent.parent))
    start = next((place for place in starts if (place / WEIGHTS).is_file()), None)
    if start is None:
        what = (
            f"the adapter completes the base quantised to {adapter.completes} (LoftQ), and its start is not beside it"
        )
        fix = f"give its run folder, with `{START}/` in it, or the base with `model.quantize: {adapter.completes}`"
        raise ModelError(Problem(what, where=str(folder), fix=fix))
    found = without_start(adapter, load_adapter(start))
    if alive:
        found.check_alive(where=str(folder))
    return found


def without_start(adapter: Adapter, start: Adapter) -> Adapter:
    """What training has changed: twice the rank, of any base. Raises ModelError where `start` is that of another."""
    if shapes_of(adapter) != shapes_of(start):
        what = f"`{START}/` is the start of another adapter: its modules or ranks are others"
        raise ModelError(Problem(what, fix="give the run folder as it was written"))
    layers = {
        path: Factors(
            torch.cat([factors.A, start.layers[path].A]),
            torch.cat([factors.B, -start.layers[path].B], dim=1),
            factors.magnitude,
        )
        for path, factors in adapter.layers.items()
    }
    return replace(adapter, config=adapter.config.with_rank_times(2), layers=layers, completes=None)


def shapes_of(adapter: Adapter) -> dict[str, tuple]:
    return {path: (factors.A.shape, factors.B.shape) for path, factors in adapter.layers.items()}
