"""What the factors of a run start from: the recipe's `lora.init`, with the weights or the rows that it is computed from."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_cli.data.order import steps
from lora_cli.data.types import Example
from lora_cli.errors import ModelError, Problem
from lora_cli.export.names import FLOATS, Files
from lora_cli.lora.base_files import stored_tensors
from lora_cli.lora.config import TAKEN_OFF
from lora_cli.lora.eva import principal_directions, ranks_by_variance
from lora_cli.lora.init import GIVEN_INITS, INITS, Init
from lora_cli.lora.peft_format import load_adapter
from lora_cli.lora.weights import LINEAR, is_quantised, weights_of
from lora_cli.models.heads import Head
from lora_cli.models.load import skeleton
from lora_cli.recipe.schema import LoRA, Recipe
from lora_cli.runs.parts import Rows
from lora_cli.runs.rows import planned
from lora_cli.train.checkpoint import newest_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

ROWS_A_BATCH = 8  # rows between two looks at whether the directions still turn
MOST_ROWS = 256  # an upper end, where they never stop turning


@dataclass(frozen=True)
class Beginning:
    """How the modules at `paths` start; `ranks` are those of single modules, where the start has chosen them."""

    init: Init
    paths: Sequence[str]
    given: Callable[[str], Tensor] | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)


def beginning(
    recipe: Recipe,
    model: "PreTrainedModel",
    paths: Sequence[str],
    rows: Rows,
    *,
    base: Path,
    head: Head | None,
    resumed: Path | None,
) -> Beginning:
    """The start that the recipe names. `resumed` are the checkpoints of the run that goes on, where one does.

    Raises ModelError where the base's files hold no weight to start from.
    """
    name = recipe.lora.init
    if name == "loftq":
        return Beginning(GIVEN_INITS[name], paths, _unquantised(model, base, head))
    if name in TAKEN_OFF and recipe.model.quantize != "none":
        log.info(
            "`lora.init: %s` starts from the quantised weights; what quantising took stays lost (see `loftq`)", name
        )
    if name != "eva":
        return Beginning(INITS[name], paths)
    if resumed and (checkpoint := newest_checkpoint(resumed)):
        layers = load_adapter(checkpoint.folder).layers  # A comes from there too
        kept = [path for path in paths if path in layers]
        return Beginning(INITS["default"], kept, ranks={path: len(layers[path].A) for path in kept})
    plan = planned(recipe, rows)
    examples = (row for _, taken in steps(rows.train, plan, seed=recipe.training.seed) for row in taken)
    few = islice(examples, MOST_ROWS)
    taken = iter(lambda: list(islice(few, ROWS_A_BATCH)), [])
    return by_variance(recipe.lora, model, paths, _forwards(model, taken))


def by_variance(lora: LoRA, model: nn.Module, paths: Sequence[str], batches: Iterable[Callable[[], None]]) -> Beginning:
    """EVA over the forwards that `batches` make; every process reads the same rows, so all find the same.

    Raises ModelError for what is no linear layer.
    """
    weights = weights_of(model)
    if other := [path for path in paths if weights[path].kind != LINEAR]:
        what = f"`lora.init: eva` looks at the inputs of linear layers, and {other[0]} is none"
        raise ModelError(Problem(what, fix="take it out of `lora.targets`, or use another `lora.init`"))
    found = principal_directions(model, paths, batches, most=max(1, round(lora.eva_rho * lora.r)))
    ranks = ranks_by_variance(found, lora.r, lora.eva_rho)
    kept = [path for path in paths if ranks[path]]
    if without := [path for path in paths if not ranks[path]]:
        log.info("EVA gives no rank to %d modules (%s …): they stay as they are", len(without), without[0])
    log.info("EVA: ranks from %d to %d on %d modules", min(map(ranks.get, kept)), max(ranks.values()), len(kept))
    return Beginning(
        GIVEN_INITS["eva"],
        kept,
        lambda path: found[path].directions[: ranks[path]],
        {path: ranks[path] for path in kept},
    )


def with_ranks(lora: LoRA, ranks: Mapping[str, int]) -> LoRA:
    """The recipe's block with these ranks, and alphas such that the scale of every module is the same as before."""
    other = {path: r for path, r in ranks.items() if r != lora.r}
    scale = lora.config().scale
    alphas = {path: scale * (r**0.5 if lora.use_rslora else r) for path, r in other.items()}
    return lora.model_copy(update={"rank_pattern": other, "alpha_pattern": alphas}) if other else lora


def _forwards(model: "PreTrainedModel", batches: Iterator[Sequence[Example]]) -> Iterator[Callable[[], None]]:
    for examples in batches:
        yield partial(_forward, model, examples)


@torch.no_grad()
def _forward(model: "PreTrainedModel", examples: Sequence[Example]) -> None:
    """A row at a time: no padding, which would be seen as inputs."""
    device = model.get_input_embeddings().weight.device
    for example in examples:
        model(input_ids=torch.tensor([example.input_ids], device=device))


def _unquantised(model: "PreTrainedModel", base: Path, head: Head | None) -> Callable[[str], Tensor]:
    """path -> the weight [out, in] as the base's files have it, read when it is asked for; the model's own where that is whole."""
    here, stored = weights_of(model), stored_tensors(base)
    files = Files.of(skeleton(base, head), stored)

    def read(path: str) -> Tensor:
        if not is_quantised(here[path].module):
            return here[path].dense()
        parts = files.parts_of(path)
        if not parts or any(stored[part.tensor].dtype not in FLOATS for part in parts):
            what = f"`lora.init: loftq` needs the unquantised weight of {path}, and the base's files do not hold it"
            raise ModelError(Problem(what, where=str(base), fix="give the 16-bit base, or use `lora.init: default`"))
        return files.read(parts)

    return read
