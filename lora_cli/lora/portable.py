"""The same update for programs that know less than PEFT's config says: one scale, or one rank and one scale for all.

s · B A  =  alpha / r · (s · r / alpha) B A        what a reader computes · what is folded into B
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F

from lora_cli.lora.adapter import Adapter, Factors
from lora_cli.lora.algebra import plain_config, refuse_dora


def folded(adapter: Adapter, path: str) -> Factors:
    """The factors for a reader that multiplies by `lora_alpha` / rank of the module, whatever else the config says.

    An adapter without rsLoRA and patterns stays as it is, bit for bit. Raises ModelError for DoRA.
    """
    refuse_dora(adapter)
    factors, own = adapter.layers[path], adapter.config.at(path)
    return _scaled(factors, own.scale * own.r / adapter.config.lora_alpha)


def uniform(adapter: Adapter) -> Adapter:
    """The adapter with one rank, the largest there is, and one alpha: without rsLoRA, without patterns.

    Lower ranks are padded with zeros. DoRA's magnitudes stay: they belong to W + ΔW, which is the same.
    """
    config = adapter.config
    r = max(len(factors.A) for factors in adapter.layers.values())
    plain = replace(config, r=r, use_rslora=False, rank_pattern={}, alpha_pattern={})
    layers = {
        path: _padded(_scaled(factors, config.at(path).scale / plain.scale), r)
        for path, factors in adapter.layers.items()
    }
    return replace(adapter, config=plain, layers=layers)


def at_scale_one(adapter: Adapter, layers: Mapping[str, Factors]) -> Adapter:
    """The adapter with other factors, whose product is the update itself."""
    ranks = {path: len(factors.A) for path, factors in layers.items()}
    config = plain_config(ranks, like=adapter.config, targets=adapter.config.target_modules)
    return replace(adapter, config=config, layers=layers)


def difference(adapter: Adapter, other: Adapter) -> float:
    """The largest ‖ΔW − ΔW'‖ / ‖ΔW‖ of any module, for adapters of the same modules; infinite where those differ."""
    if adapter.layers.keys() != other.layers.keys():
        return float("inf")
    return max(_distance(adapter, other, path) for path in adapter.layers)


def _distance(adapter: Adapter, other: Adapter, path: str) -> float:
    one, two = (_scaled(each.layers[path], each.config.at(path).scale) for each in (adapter, other))
    if (one.magnitude is None) != (two.magnitude is None):
        return float("inf")
    if one.magnitude is not None and not torch.equal(one.magnitude, two.magnitude):
        return float((one.magnitude - two.magnitude).norm() / one.magnitude.norm())
    if torch.equal(one.A, two.A) and torch.equal(one.B, two.B):
        return 0.0
    apart = Factors(torch.cat([one.A, two.A]), torch.cat([one.B, -two.B], dim=1))
    norm = one.norm()
    return apart.norm() / norm if norm else apart.norm()


def _scaled(factors: Factors, by: float) -> Factors:
    return factors if by == 1 else replace(factors, B=(by * factors.B.double()).float())


def _padded(factors: Factors, r: int) -> Factors:
    missing = r - len(factors.A)
    if not missing:
        return factors
    return replace(factors, A=F.pad(factors.A, (0, 0, 0, missing)), B=F.pad(factors.B, (0, missing)))
