"""Base and adapter on the same rows, in one load: the base is the model with its adapter switched off."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lora_cli.data.pipeline import DataReport
from lora_cli.data.types import UNKNOWN_FORM, Example, PromptForm
from lora_cli.errors import ModelError, Problem, RecipeError
from lora_cli.evaluate.loss import HeldOut, held_out_loss
from lora_cli.infer.generate import answer
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.base_files import fingerprint
from lora_cli.lora.inject import disabled
from lora_cli.lora.peft_format import load_adapter
from lora_cli.models.base import Base, resolve_base
from lora_cli.models.load import (
    check_vocabulary,
    default_device,
    load_model,
    load_tokenizer,
    resolve_dtype,
    tokenizer_folder,
)
from lora_cli.objectives.table import OBJECTIVES
from lora_cli.recipe.reader import LoadedRecipe, read_recipe
from lora_cli.recipe.schema import Model, Training
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


@dataclass(frozen=True)
class Comparison:
    base: HeldOut
    adapter: HeldOut | None
    report: DataReport


def load_pair(adapter_folder: Path | None, model: Model | None, *, allow_base_mismatch: bool = False) -> Loaded:
    """Load a base and put an adapter into it; `model` says how to hold the base, and may be left to the adapter."""
    adapter = load_adapter(adapter_folder) if adapter_folder else None
    model = model or trained_base(adapter, adapter_folder)
    base = resolve_base(model.base, model.revision)
    if adapter:
        adapter.check_alive()
        adapter.check_base(fingerprint(base.folder), base.folder, allow=allow_base_mismatch)
    device = default_device()
    loaded = load_model(
        base,
        dtype=resolve_dtype(model.dtype, device),
        quantize=model.quantize,
        attention=model.attention,
        device=device,
    )
    if adapter:
        adapter.inject_into(loaded)
    tokenizer = load_tokenizer(tokenizer_folder(adapter_folder, base.folder))
    return Loaded(base, loaded, tokenizer, adapter, trained_form(adapter_folder) if adapter_folder else UNKNOWN_FORM)


def trained_base(adapter: Adapter, folder: Path) -> Model:
    """The base as the adapter was trained on it: its run's `model` block, else the name in the adapter's config."""
    recipe = RunFolder(folder).recipe
    if recipe.is_file():
        return read_recipe(recipe).recipe.model
    if not adapter.config.base_model_name_or_path:
        raise ModelError(Problem("the adapter does not name its base", where=str(folder), fix="give it with `--base`"))
    return Model(base=adapter.config.base_model_name_or_path, revision=adapter.config.revision)


def compare(loaded: Loaded, examples: Sequence[Example], report: DataReport) -> Comparison:
    """Held-out loss of the base and of base + adapter, on the same rows in the same batches."""
    task = Task(loaded.model, OBJECTIVES["sft"])
    check_vocabulary(loaded.model, examples)
    accelerator = make_accelerator()
    layout = auto.layout(
        Training(),
        longest=max(len(example.input_ids) for example in examples),
        vocabulary=loaded.model.config.vocab_size,
        processes=accelerator.num_processes,
        device=accelerator.device,
    )
    with disabled(loaded.model):
        base = held_out_loss(task, examples, layout, accelerator)
    adapted = held_out_loss(task, examples, layout, accelerator) if loaded.adapter else None
    return Comparison(base, adapted, report)


def rows_of_recipe(recipe: LoadedRecipe, tokenizer) -> tuple[list[Example], DataReport]:
    """A recipe's held-out rows."""
    rows = load_rows(recipe, tokenizer)
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
    ask = partial(answer, loaded.model, loaded.tokenizer, prompts, form=loaded.form, max_new_tokens=max_new_tokens)
    with disabled(loaded.model):
        base = ask()
    adapted = ask() if loaded.adapter else {}
    return {
        prompt: {"base": base[prompt]} | ({"adapter": adapted[prompt]} if loaded.adapter else {}) for prompt in prompts
    }
