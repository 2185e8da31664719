"""GPUs that people rent and own: memory, and the rates that bound a training step.

Rates are the makers' own, dense (without sparsity), bf16 with float32 accumulation: NVIDIA's data sheets of T4, V100, A10,
A10G, A40, L4, L40, L40S, A100, H100, H200, B200, RTX A6000 and RTX 6000 Ada, the white papers of GA102 (RTX 30), AD102 (RTX 40)
and Blackwell (RTX 50, RTX PRO 6000).
"""

import difflib
import re
from dataclasses import dataclass
from functools import cache

from lora_cli.budget.speed import Rates
from lora_cli.errors import Problem, RecipeError

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """`bf16` and `fp8` are None where the hardware doesn't multiply them; `bf16` or else `float32` is what training runs at."""

    name: str
    gib: float
    bf16: float | None  # TFLOP/s
    fp8: float | None
    bandwidth: float  # GB/s
    float32: float | None = None

    @property
    def memory(self) -> int:
        return round(self.gib * GIB)

    @property
    def rates(self) -> Rates:
        return Rates(1e12 * (self.bf16 or self.float32 or 0), 1e9 * self.bandwidth)


GPUS: tuple[GPU, ...] = (
    GPU("T4", 15, None, None, 320, float32=8.1),
    GPU("V100 16GB", 16, None, None, 900, float32=15.7),
    GPU("V100 32GB", 32, None, None, 900, float32=15.7),
    GPU("RTX 3060", 12, 25.5, None, 360),
    GPU("RTX 3080", 10, 59.5, None, 760),
    GPU("RTX 3090", 24, 71, None, 936),
    GPU("RTX 4060 Ti 16GB", 16, 44, 88, 288),
    GPU("RTX 4070", 12, 58, 117, 504),
    GPU("RTX 4080", 16, 97, 195, 717),
    GPU("RTX 4090", 24, 165, 330, 1008),
    GPU("RTX 5070 Ti", 16, 88, 176, 896),
    GPU("RTX 5080", 16, 113, 225, 960),
    GPU("RTX 5090", 32, 209, 419, 1792),
    GPU("A10", 22.5, 125, None, 600),
    GPU("A10G", 22.5, 70, None, 600),
    GPU("L4", 22.5, 121, 242, 300),
    GPU("A40", 44.5, 150, None, 696),
    GPU("L40", 44.5, 181, 362, 864),
    GPU("L40S", 44.5, 362, 733, 864),
    GPU("RTX A6000", 47.5, 155, None, 768),
    GPU("RTX 6000 Ada", 47.5, 364, 728, 960),
    GPU("RTX PRO 6000", 95, 504, 1008, 1792),
    GPU("A100 40GB", 39.5, 312, None, 1555),
    GPU("A100 80GB", 79, 312, None, 2039),
    GPU("H100 PCIe", 79, 756, 1513, 2000),
    GPU("H100", 79, 989, 1979, 3350),
    GPU("H100 NVL", 93, 835, 1671, 3900),
    GPU("H200", 140, 989, 1979, 4800),
    GPU("B200", 178, 2250, 4500, 7700),
)


def find_gpu(name: str) -> GPU:
    """By name, in any case and spacing, with or without the maker's; `4090` will do. Raises RecipeError naming the nearest."""
    found = [gpu for gpu in GPUS if _key(gpu.name) == _key(name)] or [gpu for gpu in GPUS if _is_part(name, gpu.name)]
    if len(found) == 1:
        return found[0]
    keys = {_key(gpu.name): gpu.name for gpu in GPUS}
    near = [gpu.name for gpu in found] or [
        keys[key] for key in difflib.get_close_matches(_key(name), keys, n=3, cutoff=0.4)
    ]
    what = f"`--gpu {name}` is {'several GPUs' if found else 'no GPU'} of the catalogue"
    raise RecipeError(Problem(what, fix=f"the nearest: {', '.join(near or [gpu.name for gpu in GPUS])}"))


def gpu_of_device(device_name: str) -> GPU | None:
    """The row of a device by the name that its driver gives, such as `NVIDIA A100-SXM4-80GB`; None for one without a row."""
    words = set(_words(device_name))
    rows = [gpu for gpu in GPUS if set(_words(gpu.name)) <= words]
    return max(rows, key=lambda gpu: len(_words(gpu.name)), default=None)


def smallest(bytes_needed: float, *, bfloat16: bool) -> GPU | None:
    """The GPU of least memory that has so much of it, and bfloat16 where that is asked; of several, the fastest."""
    enough = [gpu for gpu in GPUS if gpu.memory >= bytes_needed and (gpu.bf16 or not bfloat16)]
    return min(enough, key=lambda gpu: (gpu.memory, -gpu.rates.flops), default=None)


@cache
def _words(name: str) -> tuple[str, ...]:
    return tuple(
        re.findall(r"[a-z]+[0-9]+[a-z]*|[0-9]+[a-z]*|[a-z]+", re.sub(r"nvidia|geforce|tesla", "", name.lower()))
    )


def _key(name: str) -> str:
    return "".join(_words(name))


def _is_part(asked: str, name: str) -> bool:
    words = _words(asked)
    return bool(words) and set(words) <= set(_words(name))
