"""What of a base is trained: the adapter that a recipe describes, put into it, or with `training.method: full` all of it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from lora_cli.budget.modules import biases_of, counted, of_tokens, whole_of, whole_paths
from lora_cli.budget.params import Budget, Whole, budget_of, full_budget
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.config import CAUSAL_LM, SEQ_CLS, LoRAConfig
from lora_cli.lora.inject import inject, names_of_targets
from lora_cli.lora.targets import fused_notices, names_to_save
from lora_cli.lora.tokens import begin_at_mean
from lora_cli.lora.vocabulary import make_room
from lora_cli.lora.weights import Weight, check_gradients, fan_in_fan_out, weights_of
from lora_cli.models.base import Base
from lora_cli.models.heads import Head
from lora_cli.models.tokens import ids_of_tokens
from lora_cli.recipe.schema import Recipe
from lora_cli.runs.check import target_paths
from lora_cli.runs.kinds import tell_of_kinds
from lora_cli.runs.parts import Rows
from lora_cli.runs.start import start_from
from lora_cli.runs.starts import beginning, with_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """`config` is None where no adapter is trained; see `Run` for the rest."""

    budget: Budget
    config: LoRAConfig | None = None
    transposed: bool = False
    start: Adapter | None = None


def every_weight(model: nn.Module) -> Trained:
    """Full fine-tuning. The weights stay frozen until the base has been looked at: `prepare` lets them go last."""
    return Trained(full_budget(sum(p.numel() for p in model.parameters())))


def with_adapter(
    model: "PreTrainedModel",
    recipe: Recipe,
    *,
    base: Base,
    tokenizer: "PreTrainedTokenizerBase",
    rows: Rows,
    head: Head | None,
    resumed: Path | None,
) -> Trained:
    """Freeze the model and put LoRA layers, and what is trained beside them, into it.

    `resumed` are the checkpoints of the run that goes on, where one does. Raises ModelError for what does not fit the model.
    """
    tokens = ids_of_tokens(tokenizer, recipe.lora.tokens_with_rows)
    make_room(model, tokens)
    check_gradients(model)
    whole = whole_paths(model, recipe.lora.modules_to_save)
    targets = target_paths(recipe, model, whole)
    begun = beginning(recipe, model, targets, rows, base=base.folder, head=head, resumed=resumed)
    paths, lora = begun.paths, with_ranks(recipe.lora, begun.ranks)
    for notice in fused_notices(recipe.lora.targets, paths):
        log.info(notice)
    weights = weights_of(model)
    adapted = {path: weights[path] for path in paths}
    tell_of_kinds(weights, adapted, recipe.lora)
    biases = biases_of(model, lora.bias, paths, whole)
    rows_of_tokens = of_tokens(model, lora.tokens_with_rows)
    budget = _budget(lora.config(), model, adapted, [*whole_of(model, whole), *rows_of_tokens], biases)
    every_module = [name for name, _ in model.named_modules()]
    target_modules, target_parameters = names_of_targets(model, paths)
    config = lora.config(
        target_modules,
        target_parameters=target_parameters,
        modules_to_save=names_to_save(whole, every_module),
        trainable_tokens=tokens,
        task_type=SEQ_CLS if rows.labels else CAUSAL_LM,
        base=base.name,
        revision=base.revision,
    )
    inject(model, config, paths, whole=whole, init=begun.init, given=begun.given, seed=recipe.training.seed)
    begin_at_mean(model, ids_of_tokens(tokenizer, lora.new_tokens))
    start = replace(Adapter.of(model, config), extras={}) if lora.init == "loftq" else None
    if lora.start_from:
        start_from(recipe, model, config, base.folder, rows.labels)
    return Trained(budget, config, fan_in_fan_out(adapted.values()), start)


def _budget(
    lora: LoRAConfig, model: nn.Module, adapted: Mapping[str, Weight], whole: list[Whole], biases: int
) -> Budget:
    """Counted on the real modules, before they are wrapped; a quantised base counts as the weights it stands for."""
    found = {id(weight.tensor): weight.numel for weight in weights_of(model).values()}  # a tied one once
    parameters = sum(found.values()) + sum(p.numel() for p in model.parameters() if id(p) not in found)
    new = sum(module.parameters for module in whole if module.new)
    return budget_of(counted(adapted), parameters - new, lora, whole, biases=biases)
