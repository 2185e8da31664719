"""What an export is told and what it reports: the same for every format."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from lora_cli.errors import ModelError, Problem
from lora_cli.export.grid import AUTO, NF4, Choice, Grid
from lora_cli.export.proof import Proof, compare_grids, prove_adapter
from lora_cli.export.runtimes import Subject, Unserved, check_served
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.base_files import fingerprint
from lora_cli.lora.portable import difference
from lora_cli.models.base import Base
from lora_cli.models.heads import head_of
from lora_cli.models.load import skeleton

MOST_DIFFERENCE = 1e-6  # of an update, by folding scales into float32 factors


@dataclass(frozen=True)
class HeldOutRows:
    """How many rows no training has seen, and the loss of a model on them."""

    count: int
    loss: Callable[[nn.Module], float]


@dataclass(frozen=True)
class Order:
    """An adapter, the folder it lies in (its tokenizer goes along), and where it shall go.

    `base` and `token_rows`, for the proof, matter to formats that hold the whole model or are read beside one.
    """

    adapter: Adapter
    folder: Path
    out: Path
    transposed: bool = False  # PEFT's fan_in_fan_out, as the adapter has it
    base: Base | None = None
    dtype: torch.dtype | None = None
    type: str | None = None  # of a GGUF file's matrices: a dtype, or q8_0
    token_rows: tuple[tuple[int, ...], ...] = ()
    device: torch.device | str = "cpu"
    allow_base_mismatch: bool = False
    trained: torch.dtype | None = None  # of a run whose base was in nf4: the dtype that it was quantised from
    base_grid: str = AUTO  # what such an adapter is merged into: original, nf4, or the nearer of both
    held_out: HeldOutRows | None = None  # that both are measured on

    @property
    def known_base(self) -> Base:
        if self.base is None:
            raise ModelError(
                Problem("this format needs the base, and the adapter names none", fix="name it with `--base`")
            )
        return self.base


@dataclass(frozen=True)
class ExportReport:
    """`difference` is the largest ‖written − ΔW‖ / ‖ΔW‖ of a module, read back; 0 is bit for bit, None a whole model.

    `findings` are what the runtime would not have taken as it is; `stored` the type of a whole model's weights; `use`
    how the reader is started. Without a base at hand there is no `proof` on its answers.
    """

    out: Path
    format: str
    tensors: int
    bytes: int
    difference: float | None = None
    stored: str = ""
    findings: tuple[Unserved, ...] = ()
    use: str = ""
    proof: Proof | None = None
    grid: Choice | None = None  # of a whole model, where the adapter was trained beside a base in nf4
    base_differences: tuple[str, ...] = ()

    def as_dict(self) -> dict:
        findings = [{"trait": f.trait, **asdict(f.verdict)} for f in self.findings]
        return asdict(self) | {"out": str(self.out), "findings": findings}


def subject_of(order: Order) -> Subject:
    """The adapter as runtimes see it."""
    base = skeleton(order.base.folder, head_of(order.adapter)).config if order.base else None
    return Subject.of(order.adapter, base)


def accepted(order: Order, runtime: str) -> tuple[tuple[Unserved, ...], tuple[str, ...]]:
    """What the runtime would not take as it is, and the tensors in which the base is another than the adapter's.

    Raises ModelError for what it can't serve, and for an adapter that is dead or of another base.
    """
    order.adapter.check_alive(where=str(order.folder))
    return tuple(check_served(runtime, subject_of(order))), on_its_base(order)


def on_its_base(order: Order) -> tuple[str, ...]:
    """The tensors in which the base, where one is given, is another than the adapter's.

    Raises ModelError for any, unless they are allowed, and for an adapter that doesn't fit it.
    """
    if order.base is None:
        return ()
    folder = order.base.folder
    differences = order.adapter.check_base(fingerprint(folder), folder, allow=order.allow_base_mismatch)
    order.adapter.check_fits(skeleton(folder, head_of(order.adapter)))
    return tuple(differences)


def chosen_grid(order: Order) -> tuple[Grid | None, Choice | None]:
    """The grid that a merge of the adapter stands on, None for the base as it is stored, and how that was chosen.

    Of an adapter that was not trained beside a base in nf4 there is nothing to choose.
    """
    if order.trained is None:
        return None, None
    rows = [list(row) for row in order.token_rows]
    found = order.held_out
    grid, costs, losses = compare_grids(
        order.known_base,
        order.adapter,
        rows,
        trained=order.trained,
        stored=order.dtype,
        device=order.device,
        held_out=found.loss if found else None,
    )
    choice = Choice(order.base_grid, costs, order.base_grid != AUTO, losses or None, found.count if found else 0)
    if not choice.asked:
        choice = replace(choice, name=choice.nearest)
    return (grid if choice.name == NF4 else None), choice


def proved(order: Order, written: Adapter) -> tuple[float, Proof | None]:
    """How far what was written and read back is from the adapter: update by update, and in the base's answers.

    Raises ModelError where that is more than rounding.
    """
    apart = difference(order.adapter, written)
    if not apart <= MOST_DIFFERENCE:
        what = f"what was written is not the adapter: an update differs by {apart:.2g} of its norm"
        raise ModelError(Problem(what, fix="report this; nothing was written"))
    if order.base is None:
        return apart, None
    rows = [list(row) for row in order.token_rows]
    return apart, prove_adapter(order.base, order.adapter, written, rows, device=order.device)
