"""Base and adapter on the same rows, in one load: the base is the model with its adapter switched off."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from lora_cli.data.pipeline import DataReport
from lora_cli.data.sources import quote
from lora_cli.data.types import UNKNOWN_FORM, Example, PromptForm
from lora_cli.errors import DataError, ModelError, Problem, RecipeError
from lora_cli.evaluate.loss import HeldOut, held_out_loss
from lora_cli.infer.generate import answer
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.base_files import fingerprint
from lora_cli.lora.inject import disabled
from lora_cli.lora.peft_format import load_adapter
from lora_cli.models.base import Base, resolve_base
from lora_cli.models.heads import head_in, head_of
from lora_cli.models.load import (
    check_vocabulary,
    default_device,
    load_model,
    load_tokenizer,
    resolve_dtype,
    tokenizer_folder,
)
from lora_cli.objectives.classify import accuracy_and_f1, counts
from lora_cli.objectives.table import MEASURES, OBJECTIVES
from lora_cli.recipe.reader import LoadedRecipe, read_recipe
from lora_cli.recipe.schema import Model, Training, objective_of
from lora_cli.runs.folder import RunFolder
from lora_cli.runs.record import trained_form
from lora_cli.runs.rows import load_rows
from lora_cli.train import auto
from lora_cli.train.parallel import make_accelerator
from lora_cli.train.task import Task


@dataclass(frozen=True)
class Loaded:
    """A base with an adapter in it, ready to answer; `adapter` is None for the base alone."""

    base: Base
    model: object
    tokenizer: object
    adapter: Adapter | None
    form: PromptForm  # of the rows it was trained on
    labels: tuple[str, ...] = ()  # of a classifier

    @property
    def objective(self) -> str:
        return "classify" if self.labels else "sft"


@dataclass(frozen=True)
class Majority:
    """What a classifier would reach that gives every row the label that is most common among them."""

    label: str
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Comparison:
    """`base` is None where the base has no head that could answer; `majority` is there where rows are classified."""

    base: HeldOut | None
    adapter: HeldOut | None
    report: DataReport
    majority: Majority | None = None


def load_pair(adapter_folder: Path | None, model: Model | None, *, allow_base_mismatch: bool = False) -> Loaded:
    """Load a base and put an adapter into it; `model` says how to hold the base, and may be left to the adapter."""
    adapter = load_adapter(adapter_folder) if adapter_folder else None
    model = model or trained_base(adapter, adapter_folder)
    base = resolve_base(model.base, model.revision)
    if adapter:
        adapter.check_alive()
        adapter.check_base(fingerprint(base.folder), base.folder, allow=allow_base_mismatch)
    head = head_of(adapter) if adapter else head_in(base)
    tokenizer = load_tokenizer(tokenizer_folder(adapter_folder, base.folder), writes=head is None)
    device = default_device()
    loaded = load_model(
        base,
        dtype=resolve_dtype(model.dtype, device),
        quantize=model.quantize,
        attention=model.attention,
        device=device,
        head=head and replace(head, pad_token_id=tokenizer.pad_token_id),
    )
    if adapter:
        adapter.inject_into(loaded)
    form = trained_form(adapter_folder) if adapter_folder else UNKNOWN_FORM
    return Loaded(base, loaded, tokenizer, adapter, form, head.labels if head else ())


def trained_base(adapter: Adapter, folder: Path) -> Model:
    """The base as the adapter was trained on it: its run's `model` block, else the name in the adapter's config."""
    recipe = RunFolder(folder).recipe
    if recipe.is_file():
        return read_recipe(recipe).recipe.model
    if not adapter.config.base_model_name_or_path:
        raise ModelError(Problem("the adapter does not name its base", where=str(folder), fix="give it with `--base`"))
    return Model(base=adapter.config.base_model_name_or_path, revision=adapter.config.revision)


def compare(loaded: Loaded, examples: Sequence[Example], report: DataReport) -> Comparison:
    """Held-out loss of the base and of base + adapter, on the same rows in the same batches.

    An untrained head says nothing: of a classifier's base, what the largest class alone would reach takes its place.
    """
    task, measure = Task(loaded.model, OBJECTIVES[loaded.objective]), MEASURES.get(loaded.objective)
    check_vocabulary(loaded.model, examples)
    accelerator = make_accelerator()
    layout = auto.layout(
        Training(),
        longest=max(len(example.input_ids) for example in examples),
        vocabulary=len(loaded.labels) or loaded.model.config.vocab_size,
        processes=accelerator.num_processes,
        device=accelerator.device,
    )
    base = None
    if not (loaded.labels and loaded.adapter):
        with disabled(loaded.model):
            base = held_out_loss(task, examples, layout, accelerator, measure)
    adapted = held_out_loss(task, examples, layout, accelerator, measure) if loaded.adapter else None
    return Comparison(base, adapted, report, majority_of(examples, loaded.labels) if loaded.labels else None)


def majority_of(examples: Sequence[Example], labels: Sequence[str]) -> Majority:
    actual = torch.tensor([example.label for example in examples])
    most = int(actual.bincount(minlength=len(labels)).argmax())
    weights = torch.tensor([example.items for example in examples])
    sums = counts(torch.full_like(actual, most), actual, weights, len(labels))
    return Majority(labels[most], accuracy_and_f1(sums))


def check_task(loaded: Loaded, recipe: LoadedRecipe, adapter_folder: Path | None) -> None:
    """Raise RecipeError where a recipe's objective is not what the adapter was trained for."""
    kind = objective_of(recipe.recipe.training).kind
    if kind != loaded.objective:
        what = f"`training.objective` is `{kind}`, and the model was trained for `{loaded.objective}`"
        fix = "give the recipe that it was trained with"
        raise RecipeError(Problem(what, where=str(adapter_folder or loaded.base.folder), fix=fix))


def rows_of_recipe(recipe: LoadedRecipe, loaded: Loaded) -> tuple[list[Example], DataReport]:
    """A recipe's held-out rows."""
    rows = load_rows(recipe, loaded.tokenizer)
    if rows.labels != loaded.labels:
        there, learned = (", ".join(f"`{quote(label)}`" for label in found) for found in (rows.labels, loaded.labels))
        what = f"the rows have the labels {there}, and the classifier learned {learned}"
        raise DataError(Problem(what, where=str(recipe.path), fix="give the rows that it was trained with"))
    if not rows.held_out:
        raise RecipeError(
            Problem(
                "`data.eval` is null: there are no held-out rows",
                where=str(recipe.path),
                fix="set `data.eval`, or give rows with `--data`",
            )
        )
    return rows.held_out, rows.held_out_report or rows.report


def side_by_side(loaded: Loaded, prompts: Sequence[str], max_new_tokens: int) -> dict[str, dict[str, str]]:
    """Prompt -> {"base": …, "adapter": …}: greedy answers from one load."""
    if loaded.labels:
        what = f"a classifier writes no answers: it knows the {len(loaded.labels)} labels {', '.join(loaded.labels)}"
        raise ModelError(Problem(what, where=str(loaded.base.folder), fix="measure it with `lora eval --data FILE`"))
    ask = partial(answer, loaded.model, loaded.tokenizer, prompts, form=loaded.form, max_new_tokens=max_new_tokens)
    with disabled(loaded.model):
        base = ask()
    adapted = ask() if loaded.adapter else {}
    return {
        prompt: {"base": base[prompt]} | ({"adapter": adapted[prompt]} if loaded.adapter else {}) for prompt in prompts
    }
