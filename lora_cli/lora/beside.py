"""What adapters train beside their layers (modules whole, biases, rows of tokens), added up as values.

    W = W₀ + Σ wᵢ (Wᵢ − W₀)        Wᵢ: what adapter i has there;  W₀: the base's own, and that of adapters that train nothing there

Where the weights of those that train it add up to 1, W₀ drops out, and the base is not needed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isclose

import torch
from torch import Tensor

from lora_cli.errors import ModelError, Problem
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.biases import ALL, LORA_ONLY, NONE
from lora_cli.lora.config import LoRAConfig, of_expert
from lora_cli.lora.targets import inside
from lora_cli.lora.tokens import ROWS
from lora_cli.lora.whole import State

Read = Callable[[str], Tensor | None]
"""(parameter) -> the base's own; None where the base has no such parameter"""


@dataclass(frozen=True)
class Term:
    """An adapter and how much of it; `name` is what a message calls it."""

    adapter: Adapter
    weight: float = 1.0
    name: str = "the adapter"


@dataclass(frozen=True)
class Beside:
    """By path, as `Adapter.extras`, with what the adapter's config says of it."""

    extras: Mapping[str, State] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    bias: str = NONE
    trainable_tokens: tuple[int, ...] = ()

    def put_into(self, config: LoRAConfig) -> LoRAConfig:
        """The config of an adapter that has it all."""
        own = {key: getattr(self, key) for key in ("modules_to_save", "bias", "trainable_tokens")}
        return replace(config, **own)


def no_base(parameter: str) -> Tensor | None:
    """The `Read` of who has no base at hand."""
    what = (
        f"the weights of the adapters that train {parameter} don't add up to 1, so the base's own is a part of the sum"
    )
    raise ModelError(Problem(what, fix="give the base with `--base`, or weights that add up to 1"))


def sum_beside(terms: Sequence[Term], read: Read = no_base) -> Beside:
    """Raises ModelError for what can't be added, and where the base is needed and not there."""
    holders = [term for term in terms if term.adapter.extras]
    if not holders:
        return Beside()
    _refuse_other_labels(holders)
    paths = {path for term in holders for path in term.adapter.whole}
    whole = {path for path in paths if not inside(path, paths)}
    _refuse_two_ways(terms, whole)
    tokens = tuple(sorted({token for term in holders for token in term.adapter.config.trainable_tokens}))
    extras: dict[str, dict[str, Tensor]] = {}
    for parameter in dict.fromkeys(name for term in holders for name in _parameters(term.adapter)):
        path = inside(parameter, whole) or parameter.removesuffix(".bias")
        found = [(term.weight, _parameters(term.adapter).get(parameter)) for term in holders]
        extras.setdefault(path, {})[parameter.removeprefix(f"{path}.")] = _sum(found, parameter, read)
    for path in dict.fromkeys(path for term in holders for path in term.adapter.tables):
        extras[path] = {ROWS: torch.stack([_row(holders, path, token, read) for token in tokens])}
    bias = next((kind for kind in (ALL, LORA_ONLY) if any(t.adapter.config.bias == kind for t in holders)), NONE)
    if bias == LORA_ONLY:
        extras |= _other_biases(terms, extras, read)
    names = tuple(sorted({name for term in holders for name in term.adapter.config.modules_to_save}))
    labels = next((term.adapter.labels for term in holders if term.adapter.labels), ())
    return Beside(extras, labels, names, bias, tokens)


def _parameters(adapter: Adapter) -> dict[str, Tensor]:
    """All but the rows of tokens, by the parameter's name."""
    states = {path: state for path, state in adapter.extras.items() if path not in adapter.tables}
    return {f"{path}.{name}": tensor for path, state in states.items() for name, tensor in state.items()}


def _sum(found: Sequence[tuple[float, Tensor | None]], parameter: str, read: Read) -> Tensor:
    """W₀ + Σ wᵢ (Wᵢ − W₀), float32, of those that train it."""
    trained = [(weight, tensor) for weight, tensor in found if tensor is not None]
    total = sum(weight * tensor.double() for weight, tensor in trained)
    rest = 1 - sum(weight for weight, _ in trained)
    if not isclose(rest, 0, abs_tol=1e-9):
        total = total + rest * _own(parameter, read).double()
    return total.float()


def _own(parameter: str, read: Read) -> Tensor:
    found = read(parameter)
    if found is None:
        what = f"the base has no {parameter}, so what was trained of it can be averaged and nothing else"
        raise ModelError(Problem(what, fix="give weights that add up to 1"))
    return found


def _row(holders: Sequence[Term], path: str, token: int, read: Read) -> Tensor:
    found = []
    for term in holders:
        listed = term.adapter.config.trainable_tokens
        has = path in term.adapter.tables and token in listed
        found.append((term.weight, term.adapter.extras[path][ROWS][listed.index(token)] if has else None))

    def own(parameter: str) -> Tensor | None:
        table = read(parameter)
        return None if table is None else table[token]

    return _sum(found, f"{path}.weight", own)


def _other_biases(terms: Sequence[Term], extras: Mapping[str, State], read: Read) -> dict[str, State]:
    """With `lora_only`, adapted modules that train no bias have the base's own."""
    known = {path for term in terms if term.adapter.config.bias != NONE for path in term.adapter.layers}
    paths = dict.fromkeys(path for term in terms for path in term.adapter.layers if of_expert(path)[1] is None)
    found = {path: read(f"{path}.bias") for path in paths if path not in known and path not in extras}
    return {path: {"bias": bias.float()} for path, bias in found.items() if bias is not None}


def _refuse_two_ways(terms: Sequence[Term], whole: set[str]) -> None:
    """What one adapter trains whole, or some rows of, another may not change in a second way: a sum has one of them."""
    fix = "`lora merge` one of them, and `lora extract` from the result what both have"
    for term in terms:
        tables = {path: other for other in terms for path in other.adapter.tables}
        for path in [*term.adapter.layers, *term.adapter.tables]:
            where = of_expert(path)[0]
            if owner := inside(f"{where}.", whole):
                what = f"{term.name} adapts {where}, and another adapter trains the whole of {owner}"
                raise ModelError(Problem(what, fix=fix))
            if path in tables and path in term.adapter.layers:
                what = f"{term.name} adapts {where}, and {tables[path].name} trains the rows of some tokens there"
                raise ModelError(Problem(what, fix=fix))


def _refuse_other_labels(holders: Sequence[Term]) -> None:
    labels = {term.adapter.labels: term.name for term in holders if term.adapter.labels}
    if len(labels) > 1:
        said = " and ".join(f"{', '.join(found)} in {name}" for found, name in labels.items())
        what = f"the classifiers know other labels, so that their heads have no common outputs: {said}"
        raise ModelError(Problem(what, fix="compose classifiers of the same labels"))
