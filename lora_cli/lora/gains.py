"""A DoRA as a value: what it does to the rows of the base, and a low-rank update beside it. In these, DoRAs can be added.

    m · (W + ΔW) / ‖W + ΔW‖  =  diag(g) W + N                g = m / ‖W + ΔW‖ [out],   N = diag(g) ΔW
    W + Σ wᵢ (Wᵢ − W)        =  diag(1 + Σ wᵢ (gᵢ − 1)) W + Σ wᵢ Nᵢ

(Liu et al. 2024, DoRA, equation 5). A plain LoRA has g = 1 everywhere. So a sum of DoRAs, and of DoRAs with plain
adapters, is a DoRA of all the ranks together, and a cut of N is the best cut of the whole: only the row norms must be
known, and with them the base.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_cli.errors import ModelError, Problem
from lora_cli.lora.adapter import Adapter, Factors
from lora_cli.lora.config import of_expert
from lora_cli.lora.layer import row_norms

Own = Callable[[str], Tensor]
"""(path of a module) -> the base's own weight there, [out, in]"""

SMALLEST = 1e-3  # a gain below it would need factors so large that float32 loses the base's row beside them


@dataclass(frozen=True)
class Opened:
    """`plain` has N as a plain adapter; `gains` [out] are by module, float64."""

    plain: Adapter
    gains: Mapping[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """The base's own weight at a module, [out, in], and the gains of its rows."""

    W: Tensor
    gain: Tensor

    def norm(self, update: Tensor) -> float:
        """‖diag(g) W + N − W‖ with N [out, in]; 0 where float32 rounds that off beside W."""
        whole = torch.addcmul(update, (self.gain - 1).float().unsqueeze(1), self.W)
        norm, beside = (float(torch.linalg.vector_norm(M, dtype=torch.float64)) for M in (whole, self.W))
        return norm if norm > torch.finfo(torch.float32).eps * beside else 0.0


def no_weight(path: str) -> Tensor:
    """The `Own` of who has no base at hand."""
    what = f"a DoRA scales the rows of the base, so that {path} can't be added to or cut without the base's own weight"
    raise ModelError(Problem(what, fix="give the base with `--base`"))


def opened(adapter: Adapter, own: Own) -> Opened:
    """Of a plain adapter itself, with gains of 1."""
    if not adapter.config.use_dora:
        return Opened(adapter, {path: torch.ones(len(f.B), dtype=torch.float64) for path, f in adapter.layers.items()})
    layers, gains = {}, {}
    for path, factors in adapter.layers.items():
        scale = adapter.config.at(path).scale
        norms = row_norms(Factors(factors.A, factors.B).merge_into(own(path), scale)).double()
        # a row of zeros stays one, whatever its gain
        gains[path] = torch.where(norms > torch.finfo(torch.float32).tiny, factors.magnitude.double() / norms, 1.0)
        layers[path] = Factors(factors.A, (gains[path].unsqueeze(1) * factors.B.double()).float())
    return Opened(replace(adapter, config=replace(adapter.config, use_dora=False), layers=layers), gains)


def closed(plain: Adapter, gains: Mapping[str, Tensor], own: Own) -> Adapter:
    """The DoRA that acts like diag(g) W + N: B = diag(1/g) N, and a magnitude of g · ‖W + ΔW‖, whose sign is that of g.

    Raises ModelError where a row of the base goes and something of the update stays in it.
    """
    layers = {
        path: _closed(path, factors, plain.config.at(path).scale, gains[path], own(path))
        for path, factors in plain.layers.items()
    }
    return replace(plain, config=replace(plain.config, use_dora=True), layers=layers)


def _closed(path: str, factors: Factors, scale: float, gain: Tensor, W: Tensor) -> Factors:
    lost = gain.abs() < SMALLEST
    if factors.B[lost].any():
        what = f"{path} loses {int(lost.sum())} rows of the base with these weights, and keeps an update in them: no DoRA has that"
        raise ModelError(Problem(what, fix="give other weights"))
    gain = torch.where(lost, 0.0, gain)
    B = torch.where(lost.unsqueeze(1), 0.0, factors.B.double() / torch.where(lost, 1.0, gain).unsqueeze(1)).float()
    norms = row_norms(Factors(factors.A, B).merge_into(W, scale)).double()
    return Factors(factors.A, B, (gain * norms).float())


def refuse_experts(adapter: Adapter) -> None:
    """Raise ModelError for an adapter of experts, which no DoRA can be added to."""
    expert = next((path for path in adapter.layers if of_expert(path)[1] is not None), None)
    if expert:
        what = f"PEFT's format has no magnitudes for experts ({expert}), so that they can't stand beside a DoRA"
        raise ModelError(Problem(what, fix="`lora merge` them, and `lora extract` from the result what both have"))
