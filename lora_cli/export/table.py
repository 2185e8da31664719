"""What an adapter can be exported to: a name for `--to`, and the function that writes it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_cli.errors import ModelError, Problem
from lora_cli.export.adapter_folder import write_adapter
from lora_cli.export.files import Progress
from lora_cli.export.merged import MergeReport, merge
from lora_cli.export.proof import compute_dtype, prove
from lora_cli.limits import read_json
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.peft_format import CONFIG, to_tensors
from lora_cli.models.base import Base


@dataclass(frozen=True)
class Order:
    """An adapter, the folder it lies in (its tokenizer goes along), and where it shall go.

    `base` and `token_rows`, for the proof, matter to formats that hold the whole model.
    """

    adapter: Adapter
    folder: Path
    out: Path
    transposed: bool = False  # PEFT's fan_in_fan_out, as the adapter has it
    base: Base | None = None
    dtype: torch.dtype | None = None
    token_rows: tuple[tuple[int, ...], ...] = ()
    device: torch.device | str = "cpu"
    allow_base_mismatch: bool = False


@dataclass(frozen=True)
class PeftReport:
    """`difference` is the largest between the factors written and those read back."""

    out: Path
    tensors: int
    bytes: int
    difference: float

    def as_dict(self) -> dict:
        return {"out": str(self.out), "tensors": self.tensors, "bytes": self.bytes, "difference": self.difference}


def export_peft(order: Order, progress: Progress | None = None) -> PeftReport:
    """PEFT's two files and the tokenizer, without checkpoints, logs and the rest of a run folder."""
    written = write_adapter(order.adapter, order.out, tokenizer=order.folder, transposed=order.transposed)
    return PeftReport(order.out, len(to_tensors(order.adapter)), written.bytes, 0.0)


def export_merged(order: Order, progress: Progress | None = None) -> MergeReport:
    """A model of its own, as `lora merge` writes it, proved against base + adapter."""
    if order.base is None:
        raise ModelError(Problem("merging needs the base, and the adapter names none", fix="name it with `--base`"))
    compute_dtype(order.base.folder, order.device)  # whether the proof has room, before the long part
    rows = [list(row) for row in order.token_rows]
    return merge(
        order.base.folder,
        order.adapter,
        order.out,
        dtype=order.dtype,
        base_name=order.base.name,
        tokenizer=order.folder,
        prove=lambda merged: prove(order.base, order.adapter, merged, rows, device=order.device),
        allow_base_mismatch=order.allow_base_mismatch,
        progress=progress,
    )


def is_transposed(folder: Path) -> bool:
    """What an adapter folder says of its base's weights: stored [in, out], as GPT-2's are."""
    return bool(read_json(folder / CONFIG).get("fan_in_fan_out"))


EXPORTERS: dict[str, Callable[..., PeftReport | MergeReport]] = {"peft": export_peft, "merged": export_merged}
