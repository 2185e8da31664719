"""What is worth saying of a run's targets, where they are not linear layers alone: experts, tied weights, dropout."""

import logging
from collections.abc import Mapping

from lora_cli.lora.weights import EMBEDDING, EXPERTS, Weight
from lora_cli.recipe.schema import LoRA

log = logging.getLogger(__name__)


def tell_of_kinds(weights: Mapping[str, Weight], adapted: Mapping[str, Weight], lora: LoRA) -> None:
    """Log what the user may not expect. `weights` are all that an adapter could change."""
    for notice in notices(weights, adapted, dropout=lora.dropout):
        log.warning(notice)


def notices(weights: Mapping[str, Weight], adapted: Mapping[str, Weight], *, dropout: float = 0.0) -> list[str]:
    experts = [path for path, weight in weights.items() if weight.kind == EXPERTS]
    without = [path for path in experts if path not in adapted]
    found = []
    if without:
        names = ", ".join(dict.fromkeys(".".join(path.split(".")[-2:]) for path in without))
        found.append(
            f"{len(without)} weights of experts get no adapter: name {names} in `lora.targets` to give them one"
        )
    if dropout and len(without) < len(experts):
        found.append(f"experts get no dropout (there is none in PEFT's format either): {dropout:g} is for the others")
    found += [
        f"{path} and {partner} are one weight: the adapter acts on {path} alone, and a merge makes two weights of it"
        for path in adapted
        if (partner := tied_with(path, weights)) and partner not in adapted
    ]
    if dropout and adapted and all(weight.kind == EMBEDDING for weight in adapted.values()):
        found.append("embeddings get no dropout: a token has no part that could be left out")
    return found


def tied_with(path: str, weights: Mapping[str, Weight]) -> str | None:
    """The other module that has the very same tensor."""
    own = weights[path].tensor
    return next((other for other, weight in weights.items() if other != path and weight.tensor is own), None)
