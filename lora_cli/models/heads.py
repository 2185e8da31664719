"""Classification heads: a base of any kind under a head with an output for each label.

    encoder (BERT, RoBERTa …)   first token -> [pooler] -> classifier [labels, hidden]
    decoder (Llama, Qwen …)     last token  -> score [labels, hidden]

The head is what stands outside of the base model. It is new where the base's files have none: then it starts at random
(from the seed, so a run can be repeated), and it is trained whole, like a pooler that the files lack.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lora_cli.errors import ModelError, Problem
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.config import SEQ_CLS
from lora_cli.lora.inject import generator_for
from lora_cli.models.base import Base, read_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

SUFFIX = "ForSequenceClassification"
POOLER = "pooler"
CLASSIFIES = "single_label_classification"  # a config's `problem_type`


@dataclass(frozen=True)
class Head:
    """The labels in the order of the outputs, and the token that the model takes for padding.

    `brought` are the parameters that an adapter brings: no others may be missing in the base's files. Where it is None
    the head may be new, and starts from the seed.
    """

    labels: tuple[str, ...]
    pad_token_id: int | None = None
    seed: int = 0
    brought: frozenset[str] | None = None


def head_of(adapter: Adapter) -> Head | None:
    """The head that an adapter brings; None where it is none of a classifier. Raises ModelError if it names no label."""
    if adapter.config.task_type != SEQ_CLS:
        return None
    if not adapter.labels:
        what = "the adapter is a classifier's (`task_type: SEQ_CLS`) and holds no head"
        raise ModelError(Problem(what, fix="train it again, with the head in `modules_to_save`"))
    brought = frozenset(f"{path}.{name}" for path, state in adapter.extras.items() for name in state)
    return Head(adapter.labels, brought=brought)


def head_in(base: Base) -> Head | None:
    """The head that a base has itself, such as a merged classifier; None where it has none."""
    config = read_config(base.folder)
    labels = config.get("id2label")
    if not str((config.get("architectures") or [""])[0]).endswith(SUFFIX) or not isinstance(labels, Mapping):
        return None
    return Head(tuple(str(labels[key]) for key in sorted(labels, key=int)), brought=frozenset())


def configure(config: "PretrainedConfig", head: Head) -> None:
    """What transformers and every reader of a config.json take the labels from."""
    if config.is_encoder_decoder:
        what = f"`objective: classify` reads with an encoder or a decoder, and {config.model_type} is both"
        raise ModelError(Problem(what, fix="choose a base such as BERT, RoBERTa, DeBERTa, Llama or Qwen"))
    config.id2label = dict(enumerate(head.labels))
    config.label2id = {label: number for number, label in enumerate(head.labels)}
    config.problem_type = CLASSIFIES
    config.use_cache = False


def refuse_encoder(config: "PretrainedConfig", folder: Path) -> None:
    """Raise ModelError for a model that sees what comes next: it would copy each token that it is to predict."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        what = f"the base is an encoder ({config.model_type}), which reads both ways and writes no text"
        fix = "set `training.objective: classify`, or choose a causal language model"
        raise ModelError(Problem(what, where=str(folder), fix=fix))


def head_modules(model: "PreTrainedModel") -> list[str]:
    """The paths of the head's modules: what stands outside of the base model and has parameters."""
    outside = ((name, child) for name, child in model.named_children() if name != model.base_model_prefix)
    return [name for name, child in outside if next(child.parameters(), None) is not None]


def new_modules(model: "PreTrainedModel") -> list[str]:
    """The paths of the modules that a classifier trains whole: its head, and a pooler that started at random.

    None of a language model, whose head is its own.
    """
    if not type(model).__name__.endswith(SUFFIX):
        return []
    head = head_modules(model)
    started = (name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad)
    return [*dict.fromkeys(path for path in started if path.partition(".")[0] not in head), *head]


def may_be_new(model: "PreTrainedModel", name: str) -> bool:
    """Whether a parameter that the files lack is one of a head."""
    return name.partition(".")[0] in head_modules(model) or POOLER in name.split(".")


@torch.no_grad()
def start(model: "PreTrainedModel", names: Iterable[str], seed: int) -> None:
    """Start new parameters as these models started theirs, and mark them as trainable.

    Each is a function of (seed, name) alone: the same on every process.
    """
    deviation = getattr(model.config, "initializer_range", None) or 0.02
    for name in sorted(names):
        path, _, kind = name.rpartition(".")
        parameter = model.get_parameter(name)
        if kind == "bias":
            parameter.zero_()
        elif isinstance(model.get_submodule(path), nn.Linear):
            drawn = torch.empty(parameter.shape).normal_(std=deviation, generator=generator_for(seed, name))
            parameter.copy_(drawn)
        else:
            parameter.fill_(1.0)  # the gain of a norm
        parameter.requires_grad_(True)


def architecture(model: "PreTrainedModel", labels: Sequence[str]) -> dict[str, object]:
    """What a config.json must say for AutoModelForSequenceClassification to load the model with its labels."""
    return {
        "architectures": [type(model).__name__],
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
        "problem_type": CLASSIFIES,
    }
