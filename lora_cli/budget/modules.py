"""A base measured on its modules, built without weights: for heads and whole modules, which the formulas don't know.

Needs torch and transformers, and seconds; `shapes.py` answers where neither is asked for.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from lora_cli.budget.params import Whole
from lora_cli.budget.shapes import Config, Linear, ModelShape
from lora_cli.errors import ModelError, Problem, first_line
from lora_cli.lora.biases import biased
from lora_cli.lora.inject import linears
from lora_cli.lora.targets import choose_whole, inside
from lora_cli.lora.tokens import tables
from lora_cli.lora.weights import LINEAR, Weight, storage_of, weights_of
from lora_cli.lora.whole import check_whole
from lora_cli.models.heads import Head, new_modules
from lora_cli.models.load import head_paths, without_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build(config: Config, head: Head | None, *, where: str = "") -> "PreTrainedModel":
    """The modules that a config.json describes. Raises ModelError for one that transformers can't build."""
    from transformers import AutoConfig

    given = {key: value for key, value in config.items() if value is not None and key != "model_type"}
    try:
        return without_weights(AutoConfig.for_model(str(config.get("model_type")), **given), head)
    except (ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        what = f"transformers can't build the base: {first_line(error)}"
        raise ModelError(Problem(what, where=where, fix="give a model that it knows with `--model`")) from error


def whole_paths(model: "PreTrainedModel", names: Sequence[str]) -> list[str]:
    """The modules that are trained whole: a classifier's head, and what `names` (`lora.modules_to_save`) match.

    Raises ModelError for names that match nothing, and for modules that can't be trained so.
    """
    modules = [path for path, module in model.named_modules() if path and next(module.parameters(), None) is not None]
    wanted = {*new_modules(model), *(choose_whole(names, modules) if names else ())}
    paths = [path for path in modules if path in wanted and not inside(path, wanted)]
    check_whole(model, paths)
    return paths


def whole_of(model: nn.Module, paths: Sequence[str]) -> list[Whole]:
    """The modules at `paths`, counted; before anything is wrapped, those are new that can be trained."""
    modules = ((path, list(model.get_submodule(path).parameters())) for path in paths)
    return [Whole(path, sum(p.numel() for p in own), any(p.requires_grad for p in own)) for path, own in modules]


def counted(weights: Mapping[str, Weight]) -> list[Linear]:
    """Weights that get an adapter, as a budget counts them."""
    return [Linear(path, *weight.shape[::-1], copies=weight.count or 1) for path, weight in weights.items()]


def biases_of(model: nn.Module, bias: str, paths: Sequence[str] = (), whole: Sequence[str] = ()) -> int:
    """How many numbers the biases are that are trained beside adapters at `paths`."""
    return sum(module.bias.numel() for module in biased(model, bias, paths, whole).values())


def of_tokens(model: "PreTrainedModel", tokens: Sequence[str]) -> list[Whole]:
    """The rows of these tokens in each table that has some, counted."""
    found = tables(model).items() if tokens else ()
    return [
        Whole(f"{len(set(tokens))} rows of {path}", len(set(tokens)) * table.weight.shape[1], False)
        for path, table in found
    ]


def shape_of_modules(model: "PreTrainedModel") -> ModelShape:
    """The shape of the base itself: what is new on top of it is not counted."""
    new = {id(p) for p in model.parameters() if p.requires_grad}
    frozen = {id(p): p.numel() for p in model.parameters() if id(p) not in new}
    found, seen = [], set[int]()
    for path, module in linears(model).items():
        if id(module.weight) in new:
            continue
        out_features, in_features = storage_of(module).shape(module)
        tied = _is_tied(model, module)
        found.append(Linear(path, in_features, out_features, module.bias is not None, tied))
        seen |= {id(p) for p in module.parameters() if not (tied and p is module.weight)}
    others = sum(count for key, count in frozen.items() if key not in seen)
    head = tuple(path for path in head_paths(model) if path in {linear.path for linear in found})
    by_name = {path: weight for path, weight in weights_of(model).items() if weight.kind != LINEAR}
    config = model.config.to_dict()
    return ModelShape(model.config.model_type, tuple(found), head, others, config, by_name=tuple(counted(by_name)))


def _is_tied(model: "PreTrainedModel", module: nn.Module) -> bool:
    embeddings = model.get_input_embeddings()
    return embeddings is not None and getattr(embeddings, "weight", None) is module.weight
