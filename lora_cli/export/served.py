"""An adapter as servers of PEFT's format load it: checked against what they refuse, and put right where that can be done."""

from collections.abc import Callable

from lora_cli.export.adapter_folder import bytes_of, fill
from lora_cli.export.order import ExportReport, Order, accepted, proved
from lora_cli.export.staging import staged
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.peft_format import to_tensors
from lora_cli.lora.portable import uniform

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what `--max-lora-rank` may be


def export_vllm(order: Order, progress=None) -> ExportReport:
    """PEFT's folder as it is: vLLM computes rsLoRA and patterns as PEFT does."""
    largest = max(len(factors.A) for factors in order.adapter.layers.values())
    limit = next((rank for rank in VLLM_RANKS if rank >= largest), largest)
    start = f"vllm serve {_base(order)} --enable-lora --max-lora-rank {limit} --lora-modules adapter={order.out}"
    return _export(order, "vllm", lambda adapter: adapter, start)


def export_sglang(order: Order, progress=None) -> ExportReport:
    """PEFT's folder with one rank and one scale, and without rsLoRA: SGLang computes alpha / r for all modules."""
    start = f"python -m sglang.launch_server --model-path {_base(order)} --enable-lora --lora-paths adapter={order.out}"
    return _export(order, "sglang", uniform, start)


def _export(order: Order, runtime: str, convert: Callable[[Adapter], Adapter], use: str) -> ExportReport:
    findings, differences = accepted(order, runtime)
    adapter = convert(order.adapter)
    with staged(order.out) as draft:
        apart, proof = proved(order, fill(draft, adapter, tokenizer=order.folder, transposed=order.transposed))
        size = bytes_of(draft)
    return ExportReport(
        out=order.out,
        format=runtime,
        tensors=len(to_tensors(adapter)),
        bytes=size,
        difference=apart,
        findings=findings,
        use=use,
        proof=proof,
        base_differences=differences,
    )


def _base(order: Order) -> str:
    return order.base.name if order.base else order.adapter.config.base_model_name_or_path or "BASE"
