"""In which type products are computed fast and well: the tensors' own, but where a CPU would emulate it.

A CPU without bfloat16 instructions multiplies bfloat16 five to thirty times slower than float32 (measured on AVX2);
there both factors are widened for the product, which also rounds once instead of at every partial sum.
"""

import torch
from torch import Tensor

ENOUGH_ROWS = 16  # for fewer, widening the weight costs more than the product


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products run in hardware: emulated ones are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _cpu_has_bfloat16()


def _cpu_has_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def product_type(x: Tensor, rows: int) -> torch.dtype:
    """The type in which `rows` rows of x's type are multiplied."""
    narrow = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    emulated = narrow and not (x.dtype == torch.bfloat16 and _cpu_has_bfloat16())
    return torch.float32 if emulated and rows >= ENOUGH_ROWS else x.dtype
