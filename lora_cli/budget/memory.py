"""The bytes of weights, gradients and AdamW for three ways to train one model. Activations are not counted here."""

from dataclasses import dataclass

from lora_cli.budget.params import Budget
from lora_cli.budget.quantised import NF4, Quantised, quantised_by
from lora_cli.budget.shapes import ModelShape

BF16, FP32 = 2, 4  # bytes
MOMENTS = 2 * FP32  # AdamW's running means of the gradient and of its square


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
    """Full fine-tuning, LoRA and QLoRA of the same base; of one that is quantised on disk LoRA beside that."""
    n, bf16 = shape.parameters, BF16 * shape.parameters
    full = Method("full", n, bf16, 0, gradient_bytes=BF16 * n, optimizer_bytes=(FP32 + MOMENTS) * n)
    if on_disk := quantised_by(shape.config):
        return full, _adapter(f"LoRA ({on_disk.name})", base_bytes(shape, on_disk), budget)
    return full, _adapter("LoRA", bf16, budget), _adapter("QLoRA (nf4)", base_bytes(shape, NF4), budget)


def assumptions(shape: ModelShape) -> tuple[str, ...]:
    """What `compare` takes for granted."""
    common = "weights, gradients and AdamW only: activations are not counted"
    full = "bf16 weights and gradients; float32 master weights and two moments"
    factors = "A and B, their gradients and two moments in float32"
    if on_disk := quantised_by(shape.config):
        return (
            common,
            f"full: of the 16-bit original: {full}",
            f"LoRA: base as it is on disk ({on_disk.name}, {on_disk.bits_a_weight:.3f} bits a weight of linear layers; the "
            f"rest bf16); {factors}",
        )
    return (
        common,
        f"full: {full}",
        f"LoRA: bf16 base; {factors}",
        f"QLoRA: as LoRA, but linear layers in nf4 ({NF4.bits_a_weight:.3f} bits a weight); the rest bf16",
    )


def base_bytes(shape: ModelShape, quantised: Quantised | None = None, number: int = BF16) -> int:
    """The base as stored, `number` bytes for what is not quantised: embeddings, norms, biases, experts and the head."""
    if quantised is None:
        return number * shape.parameters
    inside = [linear for linear in shape.linears if linear.path not in shape.head and quantised.holds(linear)]
    plain = shape.parameters - sum(linear.weights for linear in inside)
    return sum(map(quantised.bytes_of, inside)) + number * plain


def _adapter(name: str, base_bytes: int, budget: Budget) -> Method:
    trained = budget.trainable
    return Method(name, trained, base_bytes, budget.adapter_bytes, FP32 * trained, MOMENTS * trained)
