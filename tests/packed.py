"""Layers with the tensors and the packing of GPTQ's, AWQ's and HQQ's packages, in plain loops as their files are written.

Those packages need a GPU, or other versions than ours: what is held here is the layout, which checkpoints have. The
forward uses the codes as they were before packing, so that reading them back is held against something else.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BITS, GROUP = 4, 16
PER_WORD = 32 // BITS
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Packed(nn.Module):
    def __init__(self, W: Tensor, bias: Tensor, groups: Tensor) -> None:
        """W [out, in], and the group of each of its columns."""
        super().__init__()
        self.out_features, self.in_features = W.shape
        self.bits, self.group_size = BITS, GROUP
        self.register_buffer("bias", bias)
        count = int(groups.max()) + 1
        columns = [W[:, groups == group] for group in range(count)]
        low, high = (torch.stack([f(part, dim=1).values for part in columns]) for f in (torch.min, torch.max))
        scales = ((high - low) / (2**BITS - 1)).half()  # [groups, out]
        zeros = (-low / scales.float()).round().clamp(1, 2**BITS - 1).int()
        codes = (W.T / scales.float()[groups] + zeros[groups]).round().clamp(0, 2**BITS - 1).int()  # [in, out]
        self.register_buffer("scales", scales)
        self.register_buffer("W", ((codes - zeros[groups]) * scales.float()[groups]).T.contiguous(), persistent=False)
        self.pack(codes, zeros)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W.to(x.dtype), self.bias)


class GPTQ(Packed):
    less: int  # what a zero in the files lacks

    def __init__(self, W: Tensor, bias: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)  # `desc_act`: groups of columns that don't stand together
        groups = (torch.arange(W.shape[1]) // GROUP)[torch.randperm(W.shape[1], generator=generator)]
        super().__init__(W, bias, groups)
        self.register_buffer("g_idx", groups.int())

    def pack(self, codes: Tensor, zeros: Tensor) -> None:
        qweight = torch.zeros(self.in_features // PER_WORD, self.out_features, dtype=torch.int32)
        for i in range(self.in_features):
            qweight[i // PER_WORD] |= codes[i] << (BITS * (i % PER_WORD))
        qzeros = torch.zeros(len(zeros), self.out_features // PER_WORD, dtype=torch.int32)
        for o in range(self.out_features):
            qzeros[:, o // PER_WORD] |= (zeros[:, o] - self.less) << (BITS * (o % PER_WORD))
        self.register_buffer("qweight", qweight)
        self.register_buffer("qzeros", qzeros)


class GPTQQuantLinear(GPTQ):
    """As gptqmodel keeps it at run time: format 2, whose zeros are what they count."""

    less = 0

    def qzero_format(self) -> int:
        return 2


class QuantLinear(GPTQ):
    """As auto-gptq keeps it, and as all files have it: zeros are one less."""

    less = 1


class AWQ(Packed):
    def __init__(self, W: Tensor, bias: Tensor) -> None:
        super().__init__(W, bias, torch.arange(W.shape[1]) // GROUP)

    def pack(self, codes: Tensor, zeros: Tensor) -> None:
        for name, rows in (("qweight", codes), ("qzeros", zeros)):
            packed = torch.zeros(len(rows), self.out_features // PER_WORD, dtype=torch.int32)
            for word in range(packed.shape[1]):
                for place, column in enumerate(AWQ_ORDER):
                    packed[:, word] |= rows[:, word * PER_WORD + column] << (BITS * place)
            self.register_buffer(name, packed)


class AWQuantLinear(AWQ):
    """As gptqmodel keeps AWQ's GEMM format."""


class WQLinear_GEMM(AWQ):
    """AutoAWQ's, which calls its bits otherwise."""

    def __init__(self, W: Tensor, bias: Tensor) -> None:
        super().__init__(W, bias)
        self.w_bit = self.bits
        del self.bits


class HQQLinear(nn.Module):
    """hqq's: two codes a byte, groups along a row, and a way of its own to give the weight back."""

    def __init__(self, W: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = W.shape
        self.bias = bias
        rows = W.reshape(-1, GROUP)
        low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        scale = ((high - low) / (2**BITS - 1)).half()
        zero = (-low / scale.float()).half()
        codes = (
            (rows / scale.float() + zero.float()).round().clamp(0, 2**BITS - 1).to(torch.uint8).unflatten(0, (2, -1))
        )
        self.W_q = nn.Parameter(codes[0] << 4 | codes[1], requires_grad=False)
        self.meta = {"scale": scale, "zero": zero, "shape": W.shape}

    def dequantize(self) -> Tensor:
        codes = torch.cat([self.W_q >> 4, self.W_q & 15])
        return ((codes - self.meta["zero"].float()) * self.meta["scale"].float()).view(self.meta["shape"])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantize().to(x.dtype), self.bias)


LAYERS = {kind.__name__: kind for kind in (GPTQQuantLinear, QuantLinear, AWQuantLinear, WQLinear_GEMM, HQQLinear)}
