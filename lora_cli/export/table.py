"""What an adapter can be exported to: a name for `--to`, and the function that writes it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_cli.export.adapter_folder import write_adapter
from lora_cli.export.files import Progress
from lora_cli.export.gguf_adapter import export_gguf_adapter
from lora_cli.export.gguf_model import export_gguf
from lora_cli.export.merged import MergeReport, merge
from lora_cli.export.mlx import export_mlx
from lora_cli.export.ollama import export_ollama
from lora_cli.export.order import ExportReport, Order, chosen_grid, on_its_base
from lora_cli.export.proof import compute_dtype, prove
from lora_cli.export.served import export_sglang, export_vllm
from lora_cli.limits import read_json
from lora_cli.lora.peft_format import CONFIG, to_tensors


@dataclass(frozen=True)
class Format:
    """`write` makes it; `whole` where it holds the base's weights too; `about` says in a few words what it is."""

    about: str
    write: Callable[[Order, Progress | None], ExportReport | MergeReport]
    whole: bool = False
    needs_base: bool = True


def export_peft(order: Order, progress: Progress | None = None) -> ExportReport:
    """PEFT's two files and the tokenizer, without checkpoints, logs and the rest of a run folder."""
    differences = on_its_base(order)
    written = write_adapter(order.adapter, order.out, tokenizer=order.folder, transposed=order.transposed)
    tensors = len(to_tensors(order.adapter))
    return ExportReport(order.out, "peft", tensors, written.bytes, difference=0.0, base_differences=differences)


def export_merged(order: Order, progress: Progress | None = None) -> MergeReport:
    """A model of its own, as `lora merge` writes it, proved against base + adapter."""
    base = order.known_base
    compute_dtype(base.folder, order.device)  # whether the proof has room, before the long part
    rows = [list(row) for row in order.token_rows]
    grid, choice = chosen_grid(order)
    return merge(
        base.folder,
        order.adapter,
        order.out,
        dtype=order.dtype,
        base_name=base.name,
        tokenizer=order.folder,
        prove=lambda merged: prove(base, order.adapter, merged, rows, device=order.device, grid=grid),
        grid=grid,
        choice=choice,
        allow_base_mismatch=order.allow_base_mismatch,
        progress=progress,
    )


def is_transposed(folder: Path) -> bool:
    """What an adapter folder says of its base's weights: stored [in, out], as GPT-2's are."""
    return bool(read_json(folder / CONFIG).get("fan_in_fan_out"))


FORMATS: Mapping[str, Format] = {
    "peft": Format("PEFT's two files alone", export_peft, needs_base=False),
    "merged": Format("a whole model, as `lora merge` writes it", export_merged, whole=True),
    "gguf": Format("a whole model for llama.cpp", export_gguf, whole=True),
    "gguf-adapter": Format("a LoRA file for llama.cpp", export_gguf_adapter),
    "ollama": Format("a Modelfile and a LoRA file", export_ollama),
    "mlx": Format("mlx-lm's adapter folder", export_mlx),
    "vllm": Format("PEFT's two files, as vLLM takes them", export_vllm, needs_base=False),
    "sglang": Format("PEFT's two files, as SGLang takes them", export_sglang, needs_base=False),
}
