"""Base and adapters on the same rows, in one load: the adapters take turns on the one base."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from lora_cli.data.examples import Examples
from lora_cli.data.pipeline import OnTokenized
from lora_cli.data.report import DataReport
from lora_cli.data.sources import quote
from lora_cli.data.types import UNKNOWN_FORM, Example, PromptForm
from lora_cli.errors import DataError, ModelError, Problem, RecipeError
from lora_cli.evaluate.loss import HeldOut, held_out_loss
from lora_cli.infer.generate import answer
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.completion import load_for
from lora_cli.lora.peft_format import load_alive
from lora_cli.lora.switch import switch, switched
from lora_cli.models.base import Base, resolve_base
from lora_cli.models.heads import Head, head_in, head_of
from lora_cli.models.identity import check_base, check_tokenizer
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
from lora_cli.runs.parts import Rows
from lora_cli.runs.record import trained_form
from lora_cli.runs.rows import load_rows
from lora_cli.train import auto
from lora_cli.train.parallel import make_accelerator
from lora_cli.train.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Loaded:
    """A base in memory and the adapters that take turns on it, by the name to call each; `model` is the bare base."""

    base: Base
    model: object
    tokenizer: object
    adapters: Mapping[str, Adapter]
    forms: Mapping[str, PromptForm]  # by adapter: of the rows it was trained on
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
    adapters: Mapping[str, HeldOut]
    report: DataReport
    majority: Majority | None = None
    tuned: HeldOut | None = None  # of a model whose every weight was trained

    @property
    def measured(self) -> dict[str, HeldOut]:
        """All of them by name, the base first."""
        alone = {"base": self.base, "tuned": self.tuned}
        return {name: found for name, found in alone.items() if found} | dict(self.adapters)


def load_resident(folders: Sequence[Path], model: Model | None, *, allow_base_mismatch: bool = False) -> Loaded:
    """Load a base once for all adapters in `folders`; `model` says how to hold it, and may be left to the first of them.

    Every adapter is checked against the base and the first one's tokenizer, and put in once, before any is used.
    """
    first = next(iter(folders), None)
    model = model or trained_base(load_alive(first), first)
    adapters = {folder: load_for(folder, model.quantize) for folder in folders}
    base = resolve_base(model.base, model.revision)
    for adapter in adapters.values():
        check_base(adapter, base.folder, allow=allow_base_mismatch)
    head = _one_head(adapters) if adapters else head_in(base)
    tokens = tokenizer_folder(first, base.folder)
    tokenizer = load_tokenizer(tokens, writes=head is None)
    for adapter in adapters.values():
        check_tokenizer(adapter, tokenizer, tokens, allow=allow_base_mismatch)
    device = default_device()
    loaded = load_model(
        base,
        dtype=resolve_dtype(model.dtype, device),
        quantize=model.quantize,
        attention=model.attention,
        device=device,
        head=head and replace(head, pad_token_id=tokenizer.pad_token_id),
    )
    for adapter in adapters.values():
        switch(loaded, adapter)
    switch(loaded, None)
    names = {folder: "adapter" if len(adapters) == 1 else _name(folder) for folder in adapters}
    return Loaded(
        base,
        loaded,
        tokenizer,
        {names[folder]: adapter for folder, adapter in adapters.items()},
        {names[folder]: trained_form(folder) for folder in adapters},
        head.labels if head else (),
    )


def _one_head(adapters: Mapping[Path, Adapter]) -> Head | None:
    """The head that all of them bring. Raises ModelError where they are not classifiers of the same labels."""
    heads = {folder: head_of(adapter) for folder, adapter in adapters.items()}
    first = next(iter(heads))
    if other := next((folder for folder, head in heads.items() if head != heads[first]), None):
        what = f"{first} and {other} are not classifiers of the same labels, or only one is a classifier"
        raise ModelError(Problem(what, fix="measure them one after the other"))
    return heads[first]


def _name(folder: Path) -> str:
    """What to call one adapter of several; `base` is the base's name."""
    return "./base" if str(folder) == "base" else str(folder)


def trained_base(adapter: Adapter, folder: Path) -> Model:
    """The base as the adapter was trained on it: its run's `model` block, else the name in the adapter's config."""
    recipe = RunFolder(folder).recipe
    if recipe.is_file():
        return read_recipe(recipe).recipe.model
    if not adapter.config.base_model_name_or_path:
        raise ModelError(Problem("the adapter does not name its base", where=str(folder), fix="give it with `--base`"))
    return Model(base=adapter.config.base_model_name_or_path, revision=adapter.config.revision)


def compare(loaded: Loaded, examples: Sequence[Example], report: DataReport) -> Comparison:
    """Held-out loss of the base and of base + each adapter, on the same rows in the same batches.

    An untrained head says nothing: of a classifier's base, what the largest class alone would reach takes its place.
    """
    loss = loss_on(examples, loaded.objective, len(loaded.labels) or loaded.model.config.vocab_size)
    base = None
    if not (loaded.labels and loaded.adapters):
        base = loss(loaded.model)
    adapted = {}
    for name, adapter in loaded.adapters.items():
        with switched(loaded.model, adapter):
            adapted[name] = loss(loaded.model)
    return Comparison(base, adapted, report, majority_of(examples, loaded.labels) if loaded.labels else None)


def loss_on(examples: Sequence[Example], objective: str, vocabulary: int) -> Callable[["PreTrainedModel"], HeldOut]:
    """What measures a model on these rows, each in the same batches."""
    accelerator = make_accelerator()
    layout = auto.layout(
        Training(),
        longest=int(Examples.of(examples).lengths.max()),
        vocabulary=vocabulary,
        processes=accelerator.num_processes,
        device=accelerator.device,
    )

    def measured(model: "PreTrainedModel") -> HeldOut:
        check_vocabulary(model, examples)
        return held_out_loss(Task(model, OBJECTIVES[objective]), examples, layout, accelerator, MEASURES.get(objective))

    return measured


def held_out_of(folder: Path, tokenizer: "PreTrainedTokenizerBase", labels: tuple[str, ...]) -> Sequence[Example]:
    """The held-out rows of the run in a folder, where its recipe has any. Raises UserError where they can't be read."""
    recipe = RunFolder(folder).recipe
    loaded = read_recipe(recipe) if recipe.is_file() else None
    if loaded is None or loaded.recipe.data.eval is None:
        return []
    return _of_labels(load_rows(loaded, tokenizer), labels, recipe).held_out


def spread(examples: Sequence[Example], most: int) -> Examples:
    """At most so many of them, from the first to the last at equal distances."""
    found = Examples.of(examples)
    return found.take(np.unique(np.linspace(0, len(found) - 1, min(most, len(found))).astype(np.int64)))


def compare_with_base(
    loaded: Loaded, tuned: Path, model: Model, examples: Sequence[Example], report: DataReport
) -> Comparison:
    """Held-out loss of the base that is `loaded`, and then of the model that full fine-tuning made of it: a load each."""
    found = compare(loaded, examples, report)
    other = load_resident([], model.model_copy(update={"base": str(tuned), "revision": None}))
    return replace(found, tuned=compare(other, examples, report).base)


def majority_of(examples: Sequence[Example], labels: Sequence[str]) -> Majority:
    actual = torch.from_numpy(Examples.of(examples).labels)
    most = int(actual.bincount(minlength=len(labels)).argmax())
    weights = torch.tensor([example.items for example in examples])
    sums = counts(torch.full_like(actual, most), actual, weights, len(labels))
    return Majority(labels[most], accuracy_and_f1(sums))


def check_task(loaded: Loaded, recipe: LoadedRecipe, adapter_folders: Sequence[Path]) -> None:
    """Raise RecipeError where a recipe's objective is not what the adapter was trained for."""
    kind = objective_of(recipe.recipe.training).kind
    if kind != loaded.objective:
        what = f"`training.objective` is `{kind}`, and the model was trained for `{loaded.objective}`"
        fix = "give the recipe that it was trained with"
        raise RecipeError(Problem(what, where=str(next(iter(adapter_folders), loaded.base.folder)), fix=fix))


def rows_of_recipe(
    recipe: LoadedRecipe, loaded: Loaded, progress: OnTokenized | None = None
) -> tuple[Sequence[Example], DataReport]:
    """A recipe's held-out rows."""
    rows = _of_labels(load_rows(recipe, loaded.tokenizer, progress), loaded.labels, recipe.path)
    if not rows.held_out:
        raise RecipeError(
            Problem(
                "`data.eval` is null: there are no held-out rows",
                where=str(recipe.path),
                fix="set `data.eval`, or give rows with `--data`",
            )
        )
    return rows.held_out, rows.held_out_report or rows.report


def _of_labels(rows: Rows, labels: tuple[str, ...], recipe: Path) -> Rows:
    """The rows. Raises DataError where their labels are not those that the classifier learned."""
    if rows.labels != labels:
        there, learned = (", ".join(f"`{quote(label)}`" for label in found) for found in (rows.labels, labels))
        what = f"the rows have the labels {there}, and the classifier learned {learned}"
        raise DataError(Problem(what, where=str(recipe), fix="give the rows that it was trained with"))
    return rows


def side_by_side(loaded: Loaded, prompts: Sequence[str], max_new_tokens: int) -> dict[str, dict[str, str]]:
    """Prompt -> {"base": …, "adapter": …}: greedy answers from one load; several adapters go by their folders.

    Each adapter is asked as it was trained, the base as the first of them.
    """
    if loaded.labels:
        what = f"a classifier writes no answers: it knows the {len(loaded.labels)} labels {', '.join(loaded.labels)}"
        raise ModelError(Problem(what, where=str(loaded.base.folder), fix="measure it with `lora eval --data FILE`"))
    ask = partial(answer, loaded.model, loaded.tokenizer, prompts, max_new_tokens=max_new_tokens)
    answers = {"base": ask(form=next(iter(loaded.forms.values()), UNKNOWN_FORM))}
    for name, adapter in loaded.adapters.items():
        with switched(loaded.model, adapter):
            answers[name] = ask(form=loaded.forms[name])
    return {prompt: {name: found[prompt] for name, found in answers.items()} for prompt in prompts}
