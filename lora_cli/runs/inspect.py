"""Looking into an adapter, and comparing two: module by module, from the factors alone; from the base what needs it."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor

from lora_cli.errors import ModelError
from lora_cli.export.names import parameters_of, weights_of_base
from lora_cli.lora.adapter import Adapter, Factors
from lora_cli.lora.algebra import Term, shape_problems
from lora_cli.lora.completion import load_for
from lora_cli.lora.peft_format import to_peft
from lora_cli.lora.spectrum import Side, effective_rank, inner_product, intruders, overlap
from lora_cli.lora.svd import SVD, of_factors
from lora_cli.lora.targets import kind_of
from lora_cli.models.base import Base
from lora_cli.models.heads import head_of
from lora_cli.models.identity import check_base

ENERGY = 0.9


@dataclass(frozen=True)
class Module:
    """One module's update. `relative` is ‖ΔW‖ / ‖W‖; it and `intruders` need the base. Of a DoRA without the base,
    all is of the low-rank part."""

    path: str
    kind: str
    shape: tuple[int, int]
    r: int
    norm: float
    relative: float | None
    effective_rank: float
    energy_rank: int  # terms that hold ENERGY of ‖ΔW‖²
    intruders: int | None
    dead: bool
    singular_values: tuple[float, ...]


@dataclass(frozen=True)
class Beside:
    """What is trained beside the layers, at one path: `relative` is ‖W′ − W‖ / ‖W‖, or ‖A − B‖ / ‖A‖ of two adapters; None
    where one of both is not there."""

    path: str
    kind: str  # whole, bias or rows
    parameters: int
    relative: float | None = None


@dataclass(frozen=True)
class Inspection:
    adapter: Adapter
    folder: Path
    modules: tuple[Module, ...]
    beside: tuple[Beside, ...] = ()

    @property
    def suggested(self) -> dict[str, object] | None:
        """The keys of `lora:` in a recipe that keep ENERGY of every module's ‖ΔW‖², at the scale it has; None where that
        saves nothing. What is dead asks for nothing."""
        kinds: dict[str, Module] = {}
        for module in self.modules:
            known = kinds.get(module.kind)
            if not module.dead and (known is None or module.energy_rank > known.energy_rank):
                kinds[module.kind] = module
        if all(kinds[module.kind].energy_rank >= module.r for module in self.modules if module.kind in kinds):
            return None
        ranks = {kind: module.energy_rank for kind, module in kinds.items()}
        alphas = {kind: self._alpha(module) for kind, module in kinds.items()}
        r = _commonest(ranks.values())
        alpha = _commonest(alphas[kind] for kind in kinds if ranks[kind] == r)
        return {
            "r": r,
            "alpha": alpha,
            "rank_pattern": {kind: rank for kind, rank in ranks.items() if rank != r},
            "alpha_pattern": {kind: own for kind, own in alphas.items() if own != alpha},
        }

    def _alpha(self, module: Module) -> float:
        """With which a module of the rank that is suggested has the scale that it has."""
        config, r = self.adapter.config.at(module.path), module.energy_rank
        return float(f"{config.scale * (sqrt(r) if config.use_rslora else r):.6g}")

    def as_dict(self) -> dict:
        adapter = self.adapter
        return {
            "config": to_peft(adapter.config),
            "sha256": adapter.digest(),
            "parameters": adapter.parameters,
            "base_fingerprint": adapter.base.short if adapter.base else None,
            "tokenizer_fingerprint": asdict(adapter.tokenizer) if adapter.tokenizer else None,
            "origin": adapter.origin,
            "modules": [asdict(module) for module in self.modules],
            "beside": [asdict(part) for part in self.beside],
            "dead": [module.path for module in self.modules if module.dead],
            "suggested": self.suggested,
        }


@dataclass(frozen=True)
class Pair:
    """One module in two adapters: ‖A − B‖ / ‖A‖, the cosine of the two updates, and φ of their directions."""

    path: str
    kind: str
    relative: float
    cosine: float
    overlap: Tensor  # [r_A, r_B]
    width: int  # of the space in which the directions lie

    @property
    def by_chance(self) -> Tensor:
        """[r_A, r_B]: φ of random directions, in the mean: what the smaller of two spaces has of the larger one's share."""
        i, j = (torch.arange(1, n + 1, dtype=torch.float64) for n in self.overlap.shape)
        return torch.maximum(i.unsqueeze(1), j.unsqueeze(0)) / self.width


@dataclass(frozen=True)
class Comparison:
    config: Mapping[str, tuple[object, object]]  # the keys of adapter_config.json that differ
    only: tuple[tuple[str, ...], tuple[str, ...]]  # modules of A alone, of B alone
    same_base: bool | None  # None where one does not say
    base_differences: tuple[str, ...]  # tensors
    tokenizer_differences: tuple[str, ...]  # vocabulary, cutting, template
    pairs: tuple[Pair, ...]
    beside: tuple[Beside, ...] = ()
    dora: bool = False  # of one or both: the pairs are of the low-rank parts

    def as_dict(self) -> dict:
        return {
            "config": {key: list(values) for key, values in self.config.items()},
            "only_in_a": list(self.only[0]),
            "only_in_b": list(self.only[1]),
            "same_base": self.same_base,
            "base_differences": list(self.base_differences),
            "tokenizer_differences": list(self.tokenizer_differences),
            "modules": [asdict(pair) | {"overlap": pair.overlap.tolist()} for pair in self.pairs],
            "beside": [asdict(part) for part in self.beside],
        }


def inspect_adapter(
    folder: Path,
    base: Base | None = None,
    *,
    find_intruders: bool = False,
    allow_base_mismatch: bool = False,
    progress: Callable[[str], None] = lambda path: None,
) -> Inspection:
    """Measure every module of an adapter, one after the other; with `base`, beside the weight that it changes."""
    adapter = load_for(folder, alive=False)
    read = _weights(adapter, base, allow_base_mismatch) if base else lambda path: None
    modules = []
    for path in adapter.layers:
        progress(path)
        modules.append(_measured(adapter, path, read(path), find_intruders))
    own = parameters_of(base.folder, head_of(adapter)) if base else no_parameter
    return Inspection(adapter, folder, tuple(modules), tuple(_beside(adapter, own)))


def compare_adapters(first: Path, second: Path, side: Side = "input") -> Comparison:
    """Two adapters side by side. Raises ModelError where they see a module in different shapes."""
    a, b = load_for(first, alive=False), load_for(second, alive=False)
    if problems := shape_problems([Term(a, name=str(first)), Term(b, name=str(second))]):
        raise ModelError(*problems[:3])
    configs = to_peft(a.config), to_peft(b.config)
    both = [path for path in a.layers if path in b.layers]
    bases = a.base.differences(b.base) if a.base and b.base else []
    return Comparison(
        config={key: (configs[0][key], configs[1][key]) for key in configs[0] if configs[0][key] != configs[1][key]},
        only=(
            tuple(path for path in a.layers if path not in b.layers),
            tuple(p for p in b.layers if p not in a.layers),
        ),
        same_base=not bases if a.base and b.base else None,
        base_differences=tuple(bases),
        tokenizer_differences=tuple(a.tokenizer.differences(b.tokenizer)) if a.tokenizer and b.tokenizer else (),
        pairs=tuple(_pair(path, _spectrum(a, path), _spectrum(b, path), side) for path in both),
        beside=tuple(_both_beside(a, b)),
        dora=a.config.use_dora or b.config.use_dora,
    )


def mean_overlap(overlaps: list[Tensor]) -> Tensor:
    """[r_A, r_B]: φ averaged over the modules that have so many directions."""
    rows, columns = (max((each.shape[side] for each in overlaps), default=0) for side in (0, 1))
    total, count = (torch.zeros(rows, columns, dtype=torch.float64) for _ in range(2))
    for each in overlaps:
        i, j = each.shape
        total[:i, :j] += each
        count[:i, :j] += 1
    return total / count.clamp(min=1)


def _commonest(values: Iterable[float]) -> float:
    """Of several, the largest."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value))


def _weights(adapter: Adapter, base: Base, allow: bool) -> Callable[[str], Tensor]:
    check_base(adapter, base.folder, allow=allow)
    return weights_of_base(base.folder, [adapter])


def _measured(adapter: Adapter, path: str, W: Tensor | None, find_intruders: bool) -> Module:
    factors, scale = adapter.layers[path], adapter.config.at(path).scale
    found = of_factors(Factors(factors.A, factors.B), scale)
    update = None if W is None else factors.merge_into(W, scale) - W
    norm = found.norm if update is None else float(update.norm())
    return Module(
        path=path,
        kind=kind_of(path),
        shape=(len(factors.B), factors.A.shape[1]),
        r=len(factors.A),
        norm=norm,
        relative=None if W is None else norm / float(W.norm()),
        effective_rank=effective_rank(found.S),
        energy_rank=found.rank_of_energy(ENERGY),
        intruders=intruders(W, update) if find_intruders and W is not None else None,
        dead=not factors.act() if factors.magnitude is None else update is not None and norm <= _rounding(W),
        singular_values=tuple(found.S.tolist()),
    )


def _rounding(W: Tensor) -> float:
    """What float32 may be off beside W, all in all."""
    return torch.finfo(torch.float32).eps * float(W.norm())


def no_parameter(name: str) -> Tensor | None:
    """Where there is no base to look into."""
    return None


def _beside(adapter: Adapter, own: Callable[[str], Tensor | None]) -> Iterator[Beside]:
    tokens = list(adapter.config.trainable_tokens)
    for path, state in adapter.extras.items():
        rows = path in adapter.tables
        found = {name: own(f"{path}.{'weight' if rows else name}") for name in state}
        before = {name: W[tokens] if rows else W for name, W in found.items() if W is not None}
        yield _part(adapter, path, _change(before, state))


def _both_beside(a: Adapter, b: Adapter) -> Iterator[Beside]:
    for path in dict.fromkeys([*a.extras, *b.extras]):
        yield _part(a if path in a.extras else b, path, _change(a.extras.get(path, {}), b.extras.get(path, {})))


def _part(adapter: Adapter, path: str, relative: float | None) -> Beside:
    kind = "rows" if path in adapter.tables else "bias" if path in adapter.biases else "whole"
    return Beside(path, kind, sum(tensor.numel() for tensor in adapter.extras[path].values()), relative)


def _change(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float | None:
    """‖first − second‖ / ‖first‖ over all their tensors; None where they are not of the same shapes."""
    if {name: W.shape for name, W in first.items()} != {name: W.shape for name, W in second.items()}:
        return None
    one, two = (torch.cat([state[name].double().flatten() for name in first]) for state in (first, second))
    return float((one - two).norm() / one.norm()) if one.any() else None


def _spectrum(adapter: Adapter, path: str) -> SVD:
    factors = adapter.layers[path]
    return of_factors(factors, adapter.config.at(path).scale)


def _pair(path: str, a: SVD, b: SVD, side: Side) -> Pair:
    inner = inner_product(a, b)
    difference = sqrt(max(0.0, a.norm**2 + b.norm**2 - 2 * inner))
    return Pair(
        path=path,
        kind=kind_of(path),
        relative=difference / a.norm if a.norm else float(b.norm > 0),
        cosine=inner / (a.norm * b.norm) if a.norm and b.norm else 0.0,
        overlap=overlap(a, b, side),
        width=len(a.V if side == "input" else a.U),
    )
