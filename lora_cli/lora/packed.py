"""Weights that are packed as GPTQ's and AWQ's checkpoints are: several codes to each 32-bit number.

    GPTQ   qweight [in · bits / 32, out]   qzeros [groups, out · bits / 32]   scales [groups, out]   g_idx [in]
    AWQ    qweight [in, out · bits / 32]   qzeros [groups, out · bits / 32]   scales [groups, out]

    W[o, i] = (code − zero) · scale        of the group that i is in

Frantar et al. 2022, "GPTQ"; Lin et al. 2023, "AWQ". Kernels that order the codes anew for their own sake are not read.
"""

import torch
from torch import Tensor, nn

WORD = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of each code in a word


def read_gptq(layer: nn.Module) -> Tensor:
    """[out, in] float32. Zeros are one less in the files than they count, unless the layer says that its are not."""
    bits = _bits(layer, read=(2, 4, 8))
    _check(layer, (layer.in_features * bits // WORD, layer.out_features))
    codes, zeros = _unpacked(layer.qweight, bits, dim=0), _unpacked(layer.qzeros, bits, dim=1)
    format = getattr(layer, "qzero_format", None)  # gptqmodel's
    zeros = zeros if format is not None and format() == 2 else zeros + 1
    return _scaled(codes, zeros, layer.scales, layer.g_idx.long())


def read_awq(layer: nn.Module) -> Tensor:
    """[out, in] float32"""
    bits = _bits(layer, read=(4,))
    _check(layer, (layer.in_features, layer.out_features * bits // WORD))
    codes, zeros = (_in_order(_unpacked(packed, bits, dim=1)) for packed in (layer.qweight, layer.qzeros))
    groups = torch.arange(layer.in_features, device=codes.device) // layer.group_size
    return _scaled(codes, zeros, layer.scales, groups)


def _scaled(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    """codes [in, out], zeros and scales [groups, out] -> [out, in]"""
    return ((codes - zeros[groups]) * scales.float()[groups]).T


def _unpacked(packed: Tensor, bits: int, dim: int) -> Tensor:
    """The codes, of which the lowest bits of a word hold the first: `dim` is 32 / bits times as long."""
    shifts = torch.arange(0, WORD, bits, device=packed.device, dtype=torch.int32)
    shape = [1, 1, 1]
    shape[dim + 1] = len(shifts)
    return ((packed.unsqueeze(dim + 1) >> shifts.view(shape)) & (2**bits - 1)).flatten(dim, dim + 1)


def _in_order(codes: Tensor) -> Tensor:
    """[…, out]: AWQ interleaves the columns of each word."""
    order = torch.tensor(AWQ_ORDER, device=codes.device).argsort()
    return codes.unflatten(1, (-1, len(AWQ_ORDER)))[..., order].flatten(1)


def _bits(layer: nn.Module, read: tuple[int, ...]) -> int:
    """Raises ValueError for a width that is not read."""
    bits = layer.bits if hasattr(layer, "bits") else layer.w_bit
    if bits not in read:
        raise ValueError(f"the weight of a {type(layer).__name__} with {bits} bits can't be read")
    return bits


def _check(layer: nn.Module, packed: tuple[int, int]) -> None:
    if tuple(layer.qweight.shape) != packed:
        raise ValueError(f"a {type(layer).__name__} has its weight in an order of its own, which can't be read")
