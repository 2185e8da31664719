"""An adapter as a GGUF file, which llama.cpp and Ollama put beside a base at run time.

    blk.3.attn_q.weight.lora_a  [r, in]      blk.3.attn_q.weight.lora_b  [out, r]      adapter.lora.alpha

The loader computes alpha / r · B A, with the file's one alpha and each module's own rank: whatever else scales a module
(rsLoRA, alpha_pattern) is folded into its B. Only B has rows of the output, so only B is put in llama.cpp's order. Of the
embedding, `lora_a` is looked up in as the table itself is: it stands there as [tokens, r].
"""

from pathlib import Path

import torch

from lora_cli import __version__
from lora_cli.errors import ModelError, Problem
from lora_cli.export.gguf import (
    SUFFIX,
    architecture_of,
    gguf_package,
    in_halves,
    in_pairs,
    paired_heads,
    read_gguf,
    tensor_names,
)
from lora_cli.export.order import ExportReport, Order, accepted, proved
from lora_cli.export.staging import staged_file
from lora_cli.lora.adapter import Adapter, Factors
from lora_cli.lora.portable import at_scale_one, folded
from lora_cli.lora.weights import EMBEDDING
from lora_cli.models.load import skeleton

FILE = "adapter.gguf"
ALPHA = "adapter.lora.alpha"
TABLE = "token_embd.weight"


def export_gguf_adapter(order: Order, progress=None) -> ExportReport:
    """One file, at `out` itself where that ends in .gguf, else in that folder."""
    findings, differences = accepted(order, "gguf-adapter")
    out = order.out if order.out.suffix == SUFFIX else order.out / FILE
    with staged_file(out) as draft:
        write_adapter_file(order.adapter, order.known_base.folder, draft)
        written = read_adapter_file(draft, order.adapter, order.known_base.folder)
        apart, proof = proved(order, written)
        size = draft.stat().st_size
    return ExportReport(
        out=out,
        format="gguf-adapter",
        tensors=2 * len(order.adapter.layers),
        bytes=size,
        difference=apart,
        findings=findings,
        use=f"llama-cli -m BASE.gguf --lora {out}",
        proof=proof,
        base_differences=differences,
    )


def write_adapter_file(adapter: Adapter, base: Path, file: Path) -> None:
    """Raises ModelError for an architecture, or a module, that llama.cpp has no name for."""
    config = skeleton(base).config
    names = _names(adapter, base)
    writer = gguf_package().GGUFWriter(file, architecture_of(config, base).name)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32(ALPHA, adapter.config.lora_alpha)
    writer.add_string("general.quantized_by", f"lora {__version__}")
    for path, name in names.items():
        factors = folded(adapter, path)
        B = in_pairs(factors.B, paired_heads(config, base, path))
        A = factors.A.T if name == TABLE else factors.A
        writer.add_tensor(f"{name}.lora_a", A.contiguous().numpy())
        writer.add_tensor(f"{name}.lora_b", B.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_adapter_file(file: Path, adapter: Adapter, base: Path) -> Adapter:
    """What a file says, computed as llama.cpp's loader does: alpha / rank · B A, as an adapter of scale 1."""
    config, reader = skeleton(base).config, read_gguf(file)
    alpha = float(reader.fields[ALPHA].contents())
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    layers = {}
    for path, name in _names(adapter, base).items():
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        B = in_halves(B, paired_heads(config, base, path))
        layers[path] = Factors(A.T if name == TABLE else A, alpha / B.shape[1] * B)
    return at_scale_one(adapter, layers)


def _names(adapter: Adapter, base: Path) -> dict[str, str]:
    """llama.cpp's name of each module's weight, by the module's path."""
    name_of = tensor_names(skeleton(base).config, base)
    found = {path: name_of(path) for path in adapter.layers}
    tables = {path for path, form in adapter.forms.items() if form.kind == EMBEDDING}
    if lost := [path for path, name in found.items() if name is None or (path in tables and f"{name}.weight" != TABLE)]:
        what = f"llama.cpp has no tensor for {lost[0]} that it would look for an adapter of"
        raise ModelError(Problem(what, where=str(base), fix="`lora merge` it, and serve the merged model"))
    return {path: f"{name}.weight" for path, name in found.items()}
