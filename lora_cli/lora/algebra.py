"""Adapters as values: add and scale them exactly, combine them by TIES, DARE or pruning, cut them to a rank.

    Σ wᵢ ΔWᵢ = [w₁s₁B₁  w₂s₂B₂ …] [A₁; A₂; …]        exact, of rank r₁ + r₂ + …

Nothing is assumed of the adapters but one base: ranks, alphas, scales, rsLoRA, targets and patterns may all differ. What
comes out is a plain adapter of scale 1, each module with a rank of its own where they differ; of DoRAs, a DoRA (`gains.py`).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from lora_cli.errors import ModelError, Problem, RecipeError
from lora_cli.lora import sparse
from lora_cli.lora.adapter import Adapter, Factors
from lora_cli.lora.base_files import Fingerprint
from lora_cli.lora.beside import Beside, Read, Term, no_base, sum_beside
from lora_cli.lora.config import LoRAConfig, of_expert
from lora_cli.lora.gains import Opened, Own, Rows, closed, no_weight, opened, refuse_experts
from lora_cli.lora.inject import generator_for
from lora_cli.lora.svd import SVD, distance, of_dense, of_factors
from lora_cli.lora.targets import shortest_suffixes


@dataclass(frozen=True)
class Fit:
    """How near one module's result is to what was asked for: `norm` is ‖exact‖, `error` ‖result − exact‖ / ‖exact‖."""

    norm: float
    error: float = 0.0


Fits = Mapping[str, Fit]  # by module
PLAIN = "make it plain: `lora merge` it, then `lora extract --base M --tuned merged/ --r N`"


Combine = Callable[[Sequence[Tensor], Sequence[float], float, Generator], Tensor]
"""(dense updates, weights, density, generator) -> their combination"""


@dataclass(frozen=True)
class Method:
    """A way to combine adapters. Those that act on dense updates have a `combine`, and keep `density` of the entries."""

    combine: Combine | None = None
    density: float | None = None


METHODS: Mapping[str, Method] = {
    "linear": Method(),  # the exact sum, of all the ranks together
    "svd": Method(),  # the sum cut to the largest rank of one adapter
    "ties": Method(sparse.ties, density=0.2),
    "dare": Method(sparse.dare, density=0.5),
    "magnitude": Method(sparse.magnitude, density=0.5),
}


@dataclass(frozen=True)
class How:
    """A row of METHODS, the largest rank of the result (None: what the method does by itself), and what else it takes."""

    method: str = "linear"
    r: int | None = None
    density: float | None = None
    seed: int = 0

    @property
    def kept(self) -> float | None:
        """The share of entries that stay; None where all do."""
        return self.density or METHODS[self.method].density


def compose(
    terms: Sequence[Term],
    how: How | None = None,
    *,
    read: Read = no_base,
    own: Own = no_weight,
    each: Callable[[str], None] = lambda path: None,
) -> tuple[Adapter, Fits]:
    """The combination, and how far each module is from what the method asks for, for want of rank.

    What is trained beside the layers is added by every method, and never thinned out; `read` gives what the base has
    there. Of DoRAs the rows' gains are added, and the low-rank rest is combined as the method says; `own` gives the
    base's weights for it. `each` is told every module's path as its turn comes. Raises ModelError for what can't be added.
    """
    how = how or How()
    _refuse_other_tasks(terms)
    counted = [term for term in terms if term.weight]
    if own is no_weight and _stand_apart(counted, how):
        return _side_by_side(counted, read)
    beside = sum_beside(counted, read)
    whole = [opened(term.adapter, own) for term in counted]
    gains = _gains(counted, whole)
    counted = [replace(term, adapter=found.plain) for term, found in zip(counted, whole, strict=True)]
    layers, fits = {}, {}
    for path in dict.fromkeys(path for term in counted for path in term.adapter.layers):
        each(path)
        here = [term for term in counted if path in term.adapter.layers]
        combined = _dense if METHODS[how.method].combine else _exact
        layers[path], fits[path] = combined(here, path, how, _rows(path, gains, own))
    adapter = _of_layers(terms, layers, beside, _targets(counted))
    return closed(adapter, gains, own) if gains else adapter, fits


def weighted_sum(terms: Sequence[Term], path: str) -> Factors:
    """Σ wᵢ ΔWᵢ at one module, for a scale of 1: the factors stand beside each other."""
    A = [term.adapter.layers[path].A for term in terms]
    B = [term.weight * term.adapter.config.at(path).scale * term.adapter.layers[path].B.double() for term in terms]
    return Factors(torch.cat(A), torch.cat(B, dim=1).float())


def spectra(adapter: Adapter) -> dict[str, SVD]:
    """The singular value decomposition of every module's update. Raises ModelError for DoRA."""
    refuse_dora(adapter)
    return {path: of_factors(factors, adapter.config.at(path).scale) for path, factors in adapter.layers.items()}


def resize(
    adapter: Adapter, choose: Callable[[Mapping[str, SVD]], Mapping[str, int]], own: Own = no_weight
) -> tuple[Adapter, Fits]:
    """The best update of each module with the rank that `choose` picks for it from the spectra.

    A module whose rank is not above what it is allowed stays as it is. A DoRA's gains stay; what is cut is the low-rank
    update beside them, and the base, which `own` gives, is needed to know it.
    """
    whole = opened(adapter, own)
    gains = whole.gains if adapter.config.use_dora else {}
    found = spectra(whole.plain)
    ranks = choose(found)
    layers, fits = {}, {}
    for path, factors in whole.plain.layers.items():
        exact = weighted_sum([Term(whole.plain)], path)
        keep = ranks[path] >= len(factors.A)
        layers[path] = exact if keep else found[path].factors(ranks[path])
        missed = 0.0 if keep else found[path].error(ranks[path]) * found[path].norm
        fits[path] = _fit(found[path].norm, missed, exact, _rows(path, gains, own))
    layers = evened(layers)
    kept = {path: len(factors.A) for path, factors in layers.items()}
    config = plain_config(kept, like=adapter.config, targets=adapter.config.target_modules)
    made = replace(adapter, config=config, layers=layers)
    return closed(made, gains, own) if gains else made, fits


def plain_config(ranks: Mapping[str, int], *, like: LoRAConfig, targets: Sequence[str]) -> LoRAConfig:
    """A config of scale 1 for modules of these ranks, without DoRA: the commonest is `r`, the others are patterns."""
    ranks = {of_expert(path)[0]: rank for path, rank in ranks.items()}
    counts = Counter(ranks.values())
    r = max(counts, key=lambda rank: (counts[rank], rank), default=1)
    pattern: dict[str, int] = {}
    for rank in counts:
        chosen = [path for path in ranks if ranks[path] == rank]
        if rank != r:
            pattern |= dict.fromkeys(shortest_suffixes(chosen, ranks), rank)
    # Of two patterns that match, the first wins: the longer is the more exact
    pattern = dict(sorted(pattern.items(), key=lambda item: (-item[0].count("."), item[0])))
    return replace(
        like,
        r=r,
        lora_alpha=r,
        lora_dropout=0.0,
        use_rslora=False,
        use_dora=False,
        target_modules=tuple(sorted(targets)),
        rank_pattern=pattern,
        alpha_pattern={name: float(rank) for name, rank in pattern.items()},
    )


def evened(layers: Mapping[str, Factors]) -> dict[str, Factors]:
    """The same updates, with one rank for all experts of a parameter, as PEFT's format has them: zeros beside the others."""
    ranks: dict[str, int] = {}
    for path, factors in layers.items():
        parameter = of_expert(path)[0]
        ranks[parameter] = max(ranks.get(parameter, 0), len(factors.A))
    return {path: _padded(factors, ranks[of_expert(path)[0]]) for path, factors in layers.items()}


def _padded(factors: Factors, r: int) -> Factors:
    more = r - len(factors.A)
    if not more:
        return factors
    return replace(factors, A=F.pad(factors.A, (0, 0, 0, more)), B=F.pad(factors.B, (0, more)))


def refuse_dora(adapter: Adapter, name: str = "the adapter") -> None:
    """Raise ModelError for an update that is not its factors alone."""
    if adapter.config.use_dora:
        raise ModelError(
            Problem(
                f"{name} is a DoRA: it scales every row of the base by m / ‖W + ΔW‖, which is no low-rank update",
                fix=PLAIN,
            )
        )


def _exact(terms: Sequence[Term], path: str, how: How, rows: Rows | None) -> tuple[Factors, Fit]:
    """The sum itself; cut where a rank is asked for, or where all the ranks together are more than the weight is wide."""
    factors = weighted_sum(terms, path)
    most = min(factors.A.shape[1], factors.B.shape[0])
    if how.r or how.method == "svd":
        most = min(most, how.r or max(len(term.adapter.layers[path].A) for term in terms))
    found = of_factors(factors, 1.0)
    if len(factors.A) <= most:
        return factors, _fit(found.norm, 0.0, factors, rows)
    return found.factors(most), _fit(found.norm, found.error(most) * found.norm, factors, rows)


def _dense(terms: Sequence[Term], path: str, how: How, rows: Rows | None) -> tuple[Factors, Fit]:
    """Combined entry by entry, and cut to the rank asked for, or to all the ranks together."""
    layers = [(term.adapter.layers[path], term.adapter.config.at(path).scale) for term in terms]
    updates = [scale * factors.B @ factors.A for factors, scale in layers]
    generator = generator_for(how.seed, path)
    combined = METHODS[how.method].combine(updates, [term.weight for term in terms], how.kept, generator)
    r = min(how.r or sum(len(factors.A) for factors, _ in layers), *combined.shape)
    factors = of_dense(combined, r, generator).factors(r)
    return factors, _fit(float(combined.norm()), distance(combined, factors), combined, rows)


def _fit(norm: float, missed: float, exact: Factors | Tensor, rows: Rows | None) -> Fit:
    """Of an update of this norm; with the gains of a DoRA's rows, of all that it changes."""
    if rows is not None:
        norm = rows.norm(exact if isinstance(exact, Tensor) else exact.B @ exact.A)
    return Fit(norm, missed / norm if norm else 0.0)


def _gains(terms: Sequence[Term], whole: Sequence[Opened]) -> dict[str, Tensor]:
    """1 + Σ wᵢ (gᵢ − 1) at every module; none where no adapter is a DoRA."""
    if not any(term.adapter.config.use_dora for term in terms):
        return {}
    found: dict[str, Tensor] = {}
    for term, opened_ in zip(terms, whole, strict=True):
        refuse_experts(term.adapter)
        for path, gain in opened_.gains.items():
            found[path] = found.get(path, 1.0) + term.weight * (gain - 1)
    return found


def _rows(path: str, gains: Mapping[str, Tensor], own: Own) -> Rows | None:
    return Rows(own(path), gains[path]) if gains else None


def _stand_apart(terms: Sequence[Term], how: How) -> bool:
    """DoRAs with no module in common, each as it is: the one sum of them that needs no base."""
    counts = Counter(path for term in terms for path in term.adapter.layers)
    alone = all(count == 1 for count in counts.values())
    all_dora = all(term.adapter.config.use_dora and term.weight == 1 for term in terms)
    return bool(terms) and alone and all_dora and how.method == "linear" and not how.r


def _side_by_side(terms: Sequence[Term], read: Read) -> tuple[Adapter, Fits]:
    layers = {
        path: replace(factors, B=term.adapter.config.at(path).scale * factors.B)
        for term in terms
        for path, factors in term.adapter.layers.items()
    }
    adapter = _of_layers(terms, layers, sum_beside(terms, read), _targets(terms))
    fits = {path: Fit(of_factors(factors, 1.0).norm) for path, factors in layers.items()}
    return replace(adapter, config=replace(adapter.config, use_dora=True)), fits


def _of_layers(terms: Sequence[Term], layers: Mapping[str, Factors], beside: Beside, targets: Sequence[str]) -> Adapter:
    layers, forms = evened(layers), {path: form for term in terms for path, form in term.adapter.forms.items()}
    ranks = {path: len(factors.A) for path, factors in layers.items()}
    config = beside.put_into(plain_config(ranks, like=_like(terms), targets=targets))
    return Adapter(config, layers, _base(terms), beside.extras, beside.labels, forms=forms)


def _like(terms: Sequence[Term]) -> LoRAConfig:
    """The first adapter's config, with the name of the base and the task of whichever says them."""
    configs = [term.adapter.config for term in terms]
    named = next((config for config in configs if config.base_model_name_or_path), configs[0])
    task = next((config.task_type for config in configs if config.task_type), None)
    return replace(
        configs[0],
        target_parameters=_parameters(terms),
        base_model_name_or_path=named.base_model_name_or_path,
        revision=named.revision,
        task_type=task,
    )


def _targets(terms: Sequence[Term]) -> list[str]:
    return sorted({target for term in terms for target in term.adapter.config.target_modules})


def _parameters(terms: Sequence[Term]) -> tuple[str, ...]:
    return tuple(sorted({target for term in terms for target in term.adapter.config.target_parameters}))


def _base(terms: Sequence[Term]) -> Fingerprint | None:
    return next((term.adapter.base for term in terms if term.adapter.base), None)


def _refuse_other_tasks(terms: Sequence[Term]) -> None:
    tasks = {term.adapter.config.task_type for term in terms} - {None}
    if len(tasks) > 1:
        raise RecipeError(
            Problem(f"the adapters are of different tasks: {', '.join(sorted(tasks))}", fix="compose those of one task")
        )


def base_differences(terms: Sequence[Term]) -> list[tuple[str, list[str]]]:
    """(name, tensors) of each adapter that was trained on another base than the first that names its base."""
    known = _base(terms)
    found = [(term.name, known.differences(term.adapter.base)) for term in terms if term.adapter.base and known]
    return [(name, names) for name, names in found if names]


def shape_problems(terms: Sequence[Term]) -> list[Problem]:
    """Modules that the adapters see in different shapes."""
    shapes: dict[str, tuple[str, tuple[int, int]]] = {}
    problems = []
    for term in terms:
        for path, factors in term.adapter.layers.items():
            shape = (factors.B.shape[0], factors.A.shape[1])
            name, first = shapes.setdefault(path, (term.name, shape))
            if first != shape:
                problems.append(
                    Problem(
                        f"{path} is {list(first)} in {name} and {list(shape)} in {term.name}",
                        fix="compose adapters of one base",
                    )
                )
    return problems
