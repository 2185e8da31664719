"""In which type products are computed fast and well: the tensors' own, but where a CPU would emulate it.

A CPU without bfloat16 instructions multiplies bfloat16 five to thirty times slower than float32 (measured on AVX2);
there both factors are widened for the product, which also rounds once instead of at every partial sum.
"""

import torch
from torch import Tensor

from lora_cli.kernels.sizes import ENOUGH_ROWS


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products run in hardware: emulated ones are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _cpu_has_bfloat16()


def _cpu_has_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def is_emulated(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of this type are made of others on this device."""
    narrow = device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)
    return narrow and not (dtype == torch.bfloat16 and _cpu_has_bfloat16())


def product_type(x: Tensor, rows: int) -> torch.dtype:
    """The type in which `rows` rows of x's type are multiplied."""
    return torch.float32 if rows >= ENOUGH_ROWS and is_emulated(x.dtype, x.device) else x.dtype
