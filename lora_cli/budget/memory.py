"""The bytes of weights, gradients and AdamW for three ways to train one model. Activations are not counted here."""

from dataclasses import dataclass

from lora_cli.budget.params import Budget
from lora_cli.budget.shapes import ModelShape

BF16, FP32 = 2, 4  # bytes
MOMENTS = 2 * FP32  # AdamW's running means of the gradient and of its square
# nf4 with double quantisation (Dettmers et al. 2023, section 3): 4 bits a weight, an 8-bit scale a block of 64, and a
# 32-bit scale for 256 of those
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)

ASSUMPTIONS = (
    "weights, gradients and AdamW only: activations are not counted",
    "full: bf16 weights and gradients; float32 master weights and two moments",
    "LoRA: bf16 base; A and B, their gradients and two moments in float32",
    f"QLoRA: as LoRA, but linear layers in nf4 ({NF4_BITS:.3f} bits a weight); the rest bf16",
)


@dataclass(frozen=True)
class Method:
    """One way to train, in parameters and bytes."""

    name: str
    trainable: int
    base_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.base_bytes + self.adapter_bytes + self.gradient_bytes + self.optimizer_bytes


def compare(shape: ModelShape, budget: Budget) -> tuple[Method, ...]:
    """Full fine-tuning, LoRA and QLoRA of the same base."""
    n, bf16 = shape.parameters, BF16 * shape.parameters
    return (
        Method("full", n, bf16, 0, gradient_bytes=BF16 * n, optimizer_bytes=(FP32 + MOMENTS) * n),
        _adapter("LoRA", bf16, budget),
        _adapter("QLoRA (nf4)", base_bytes(shape, "nf4"), budget),
    )


def base_bytes(shape: ModelShape, quantize: str = "none", number: int = BF16) -> int:
    """The base as stored, `number` bytes for what is not quantised: embeddings, norms, biases, experts and the head."""
    inside = [linear for linear in shape.linears if linear.path not in shape.head]
    quantised = 0 if quantize == "none" else sum(linear.weights for linear in inside)
    bits = {"none": 0, "nf4": NF4_BITS, "int8": 8}[quantize]
    scales = FP32 * sum(linear.out_features for linear in inside) if quantize == "int8" else 0
    return round(quantised * bits / 8) + scales + number * (shape.parameters - quantised)


def _adapter(name: str, base_bytes: int, budget: Budget) -> Method:
    trained = budget.trainable
    return Method(name, trained, base_bytes, budget.adapter_bytes, FP32 * trained, MOMENTS * trained)
