"""How a recipe becomes a trained adapter: its parts are made, handed to the loop, and what comes out is saved.

prepare   recipe -> base, tokenizer, rows, model with LoRA layers, plan       everything that can fail early
execute   those parts -> the loop's events, checkpoints on the way            `for event in execute(run): …`
finish    -> PEFT's two files, tokenizer, run.json, read back and checked
"""

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import nn

from lora_cli.budget.params import Budget, budget_of
from lora_cli.budget.shapes import Linear
from lora_cli.data.pipeline import steps
from lora_cli.errors import ModelError, Problem, RecipeError
from lora_cli.evaluate.loss import held_out_loss
from lora_cli.infer.generate import answer
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.base_files import fingerprint
from lora_cli.lora.init import INITS
from lora_cli.lora.inject import frozen_digest, inject, linears
from lora_cli.lora.peft_format import load_adapter, save_adapter
from lora_cli.lora.targets import fused_notices, shortest_suffixes
from lora_cli.lora.weights import storage_of
from lora_cli.models.attention import packs
from lora_cli.models.base import resolve_base
from lora_cli.models.load import (
    checkpoint_activations,
    default_device,
    load_model,
    load_tokenizer,
    resolve_dtype,
)
from lora_cli.objectives.table import OBJECTIVES
from lora_cli.recipe.reader import LoadedRecipe, resolved_yaml
from lora_cli.recipe.schema import Recipe, seconds_of
from lora_cli.runs.check import check_rows, target_paths
from lora_cli.runs.folder import RunFolder, write_json
from lora_cli.runs.parts import Rows, Run
from lora_cli.runs.proof_rows import write_proof_rows
from lora_cli.runs.record import record
from lora_cli.runs.resume import comparable, continued
from lora_cli.runs.rows import load_rows, planned
from lora_cli.train import auto
from lora_cli.train.checkpoint import save_checkpoint
from lora_cli.train.events import Event, Started
from lora_cli.train.loop import Actions, Progress, Settings, train
from lora_cli.train.optim import make_optimizer, make_schedule
from lora_cli.train.parallel import agree, local_rank, make_accelerator
from lora_cli.train.sinks import check_trackers, open_sinks
from lora_cli.train.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel


log = logging.getLogger(__name__)

# What `finish` has checked, or it would not have returned.
PROOFS = [
    "every value finite, some lora_B · lora_A not zero",
    "frozen base unchanged",
    "adapter read back equal to what was trained",
]


def prepare(loaded: LoadedRecipe, folder: RunFolder) -> Run:
    """Make the parts of a run. What needs no weights comes first, so that mistakes are found in seconds."""
    recipe = loaded.recipe
    check_trackers(recipe.training.trackers)
    device = default_device(local_rank())
    dtype = _training_dtype(recipe, device)
    accelerator = make_accelerator()
    with accelerator.local_main_process_first():
        base = resolve_base(recipe.model.base, recipe.model.revision)
    identity = fingerprint(base.folder)
    tokenizer = load_tokenizer(base.folder)
    rows = load_rows(loaded, tokenizer)
    check_rows(loaded, base, tokenizer, rows)
    training = recipe.training
    model = load_model(
        base, dtype=dtype, quantize=recipe.model.quantize, attention=recipe.model.attention, device=device
    )
    paths = target_paths(recipe, model)
    for notice in fused_notices(recipe.lora.targets, paths):
        log.info(notice)
    if experts := [name for name, p in model.named_parameters() if p.ndim == 3 and "experts" in name]:
        log.warning("%d weights of experts (%s …) are no linear layers and get no adapter", len(experts), experts[0])
    adapted = {path: model.get_submodule(path) for path in paths}
    budget = _budget(recipe, model, adapted)
    config = recipe.lora.config(
        shortest_suffixes(paths, [name for name, _ in model.named_modules()]), base=base.name, revision=base.revision
    )
    settings = _settings(recipe, rows, model, accelerator, device)  # probes the base, so before it has an adapter
    inject(model, config, paths, init=INITS[recipe.lora.init], seed=training.seed)
    if auto.gradient_checkpointing(training, device):
        checkpoint_activations(model)
    return Run(
        loaded=loaded,
        folder=folder,
        base=base,
        fingerprint=identity,
        tokenizer=tokenizer,
        rows=rows,
        model=model,
        config=config,
        transposed=any(storage_of(module).transposed for module in adapted.values()),
        budget=budget,
        plan=planned(recipe, rows),
        settings=settings,
        dtype=dtype,
        accelerator=accelerator,
        frozen=frozen_digest(model),
    )


def execute(run: Run, *, resume: bool = False) -> Iterator[Event]:
    """Train; yield what happens. Files are written by the first process alone."""
    task = Task(run.model, OBJECTIVES[run.recipe.training.objective])
    task.train()
    parameters = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(run.recipe.training, parameters)
    progress = continued(run, optimizer, parameters) if resume else Progress()
    agree(run.accelerator, {"the step": progress.step, "the planned steps": run.plan.steps} | comparable(run))
    wrapped = run.accelerator.prepare(task) if run.accelerator.num_processes > 1 else task
    first = run.accelerator.is_main_process
    if first:
        run.folder.recipe.write_text(resolved_yaml(run.loaded))
        write_json(run.folder.record, record(run))
    events = _events(run, wrapped, task, optimizer, parameters, progress)
    with open_sinks(run.recipe.training.trackers, run.folder.path) if first else nullcontext([]) as sinks:
        for event in events:
            for sink in sinks:
                sink(event)
            yield event


def finish(run: Run) -> Adapter:
    """Save the adapter and read it back.

    Raises for an adapter that does nothing or is not finite, for a base that has changed, and for a file that differs
    from what was trained.
    """
    adapter = Adapter.of(run.model, run.config, run.fingerprint)
    adapter.check_alive()
    if frozen_digest(run.model) != run.frozen:
        raise RuntimeError("the frozen base has changed during training")
    save_adapter(adapter, run.folder.path, transposed=run.transposed)
    run.tokenizer.save_pretrained(run.folder.path)
    write_proof_rows(run.folder.path, [row.input_ids for row in (run.rows.held_out or run.rows.train)])
    _check_same(adapter, load_adapter(run.folder.path), run.folder.path)
    write_json(run.folder.record, record(run) | {"proofs": PROOFS})
    return adapter


def _events(run: Run, wrapped: nn.Module, task: Task, optimizer, parameters, progress: Progress) -> Iterator[Event]:
    training = run.recipe.training
    yield Started(
        step=progress.step,
        steps=run.plan.steps,
        rows=len(run.rows.train),
        parameters=run.budget.trainable,
        micro_batch_size=run.settings.layout.micro_batch_size,
        processes=run.accelerator.num_processes,
    )
    yield from train(
        wrapped,
        optimizer,
        parameters,
        steps(run.rows.train, run.plan, seed=training.seed, start=progress.step),
        last_step=run.plan.steps,
        schedule=make_schedule(training, run.plan.steps),
        settings=run.settings,
        actions=_actions(run, task, optimizer, parameters),
        progress=progress,
        accelerator=run.accelerator,
    )


def _actions(run: Run, task: Task, optimizer, parameters) -> Actions:
    training = run.recipe.training

    def evaluate() -> tuple[float, int]:
        measured = held_out_loss(task, run.rows.held_out, run.settings.layout, run.accelerator)
        return measured.loss, measured.tokens

    def sample() -> dict[str, str]:
        return answer(run.model, run.tokenizer, training.sample_prompts, format=run.rows.report.format)

    def save(progress: Progress) -> str:
        if run.accelerator.is_main_process:
            save_checkpoint(
                run.folder.checkpoints,
                progress,
                Adapter.of(run.model, run.config, run.fingerprint),
                optimizer,
                parameters,
                settings=comparable(run),
                transposed=run.transposed,
                keep=training.keep_checkpoints,
            )
        run.accelerator.wait_for_everyone()
        return str(run.folder.checkpoints)

    return Actions(evaluate if run.rows.held_out else None, sample if training.sample_prompts else None, save)


def _settings(
    recipe: Recipe, rows: Rows, model: "PreTrainedModel", accelerator: Accelerator, device: torch.device
) -> Settings:
    training = recipe.training
    longest = max(len(example.input_ids) for example in (*rows.train, *rows.held_out))
    return Settings(
        layout=auto.layout(
            training,
            longest=longest,
            vocabulary=model.config.vocab_size,
            processes=accelerator.num_processes,
            device=device,
            pack_to=recipe.data.max_length if recipe.data.packing and packs(model) else None,
        ),
        seed=training.seed,
        max_grad_norm=training.max_grad_norm,
        eval_steps=training.eval_steps,
        save_steps=training.save_steps,
        max_seconds=None if training.max_time is None else seconds_of(training.max_time),
        patience=training.early_stopping_patience,
    )


def _training_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    if recipe.model.dtype == "float16":
        raise RecipeError(
            Problem(
                "`model.dtype: float16` can't be trained: its gradients underflow without loss scaling",
                fix="use `model.dtype: auto`, which is bfloat16 where the hardware has it and float32 otherwise",
            )
        )
    return resolve_dtype(recipe.model.dtype, device)


def _budget(recipe: Recipe, model: nn.Module, adapted: dict[str, nn.Module]) -> Budget:
    """Counted on the real modules, before they are wrapped; a quantised base counts as the weights it stands for."""
    shapes = {path: storage_of(module).shape(module) for path, module in adapted.items()}
    counted = [Linear(path, in_features, out_features) for path, (out_features, in_features) in shapes.items()]
    packed = {id(m.weight): m for m in linears(model).values()}
    parameters = sum(
        storage_of(packed[id(p)]).shape(packed[id(p)])[0] * storage_of(packed[id(p)]).shape(packed[id(p)])[1]
        if id(p) in packed
        else p.numel()
        for p in model.parameters()
    )
    return budget_of(counted, parameters, recipe.lora.config())


def _check_same(trained: Adapter, saved: Adapter, folder: Path) -> None:
    if saved.digest() != trained.digest():
        raise ModelError(
            Problem(
                "what was saved is not what was trained",
                where=str(folder),
                fix="resume from the last checkpoint; check the disk",
            )
        )
