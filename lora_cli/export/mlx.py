"""An adapter as mlx-lm reads it: `adapters.safetensors` and an `adapter_config.json` of its own.

    model.layers.3.self_attn.q_proj.lora_a  [in, r] = Aᵀ      ….lora_b  [r, out] = Bᵀ      ….m  [out], with DoRA

It knows one rank and one scale for all modules. Names that a model lacks it passes over in silence, so that only those
architectures are written whose modules it calls as transformers does.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save

from lora_cli.export.order import ExportReport, Order, accepted, proved
from lora_cli.export.staging import staged
from lora_cli.lora.adapter import Adapter, Factors
from lora_cli.lora.portable import at_scale_one, uniform
from lora_cli.models.load import skeleton

CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"
BLOCK = re.compile(r"(?:.*\.)?layers\.\d+\.")


def export_mlx(order: Order, progress=None) -> ExportReport:
    """A folder for `--adapter-path`."""
    findings, differences = accepted(order, "mlx")
    base = order.known_base
    blocks = skeleton(base.folder).config.num_hidden_layers
    with staged(order.out) as draft:
        _write(uniform(order.adapter), draft, blocks=blocks, base=base.name)
        apart, proof = proved(order, read_mlx(draft, order.adapter))
        size = sum(file.stat().st_size for file in draft.iterdir())
    return ExportReport(
        out=order.out,
        format="mlx",
        tensors=2 * len(order.adapter.layers),
        bytes=size,
        difference=apart,
        findings=findings,
        use=f"mlx_lm.generate --model {base.name} --adapter-path {order.out}",
        proof=proof,
        base_differences=differences,
    )


def read_mlx(folder: Path, adapter: Adapter) -> Adapter:
    """What a folder says, computed as mlx-lm does: scale · (x lora_a) lora_b, as an adapter of scale 1."""
    scale = json.loads((folder / CONFIG).read_text())["lora_parameters"]["scale"]
    found = load_file(folder / WEIGHTS)
    layers = {
        path: Factors(found[f"{path}.lora_a"].T, scale * found[f"{path}.lora_b"].T, found.get(f"{path}.m"))
        for path in adapter.layers
    }
    read = at_scale_one(adapter, layers)
    return replace(read, config=replace(read.config, use_dora=adapter.config.use_dora))


def _write(adapter: Adapter, folder: Path, *, blocks: int, base: str) -> None:
    """Every block gets layers of all keys; where the adapter has none, they start as the base, and stay there."""
    keys = sorted({BLOCK.sub("", path) for path in adapter.layers})
    parameters = {"rank": adapter.config.r, "scale": adapter.config.scale, "dropout": 0.0, "keys": keys}
    kind = "dora" if adapter.config.use_dora else "lora"
    config = {"model": base, "fine_tune_type": kind, "num_layers": blocks, "lora_parameters": parameters}
    tensors = {}
    for path, factors in adapter.layers.items():
        tensors[f"{path}.lora_a"] = factors.A.T.contiguous()
        tensors[f"{path}.lora_b"] = factors.B.T.contiguous()
        if factors.magnitude is not None:
            tensors[f"{path}.m"] = factors.magnitude
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    (folder / WEIGHTS).write_bytes(save(tensors, {"format": "mlx"}))
