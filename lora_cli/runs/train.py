"""How a recipe becomes a trained adapter: its parts are made, handed to the loop, and what comes out is saved.

prepare   recipe -> base, tokenizer, rows, model and what of it is trained    everything that can fail early
execute   those parts -> the loop's events, checkpoints on the way            `for event in execute(run): …`
finish    -> PEFT's two files (or a model), tokenizer, run.json, page and card, read back and checked
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lora_cli.data.examples import Examples, sources_in
from lora_cli.data.order import places, steps
from lora_cli.data.pipeline import OnTokenized
from lora_cli.data.types import Example, PromptForm
from lora_cli.durable import draft_of, move_into, replace_file
from lora_cli.errors import DivergedError, ModelError, Problem, RecipeError
from lora_cli.evaluate.loss import held_out_loss
from lora_cli.infer.generate import answer
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.base_files import fingerprint
from lora_cli.lora.completion import START, without_start
from lora_cli.lora.inject import disabled, frozen_digest
from lora_cli.lora.peft_format import WEIGHTS, load_adapter, save_adapter
from lora_cli.lora.shards import InShards
from lora_cli.lora.tuned import Tuned
from lora_cli.models.attention import packs
from lora_cli.models.base import Base, resolve_base
from lora_cli.models.heads import Head
from lora_cli.models.identity import tokenizer_identity
from lora_cli.models.load import default_device, load_model, resolve_dtype
from lora_cli.models.recompute import checkpoint_activations, setting_of
from lora_cli.models.save import CONFIG as MODEL_CONFIG
from lora_cli.models.save import check_saved, save_model, weights_digest
from lora_cli.models.shared import LoadModel
from lora_cli.objectives.table import MEASURES, OBJECTIVES
from lora_cli.recipe.reader import LoadedRecipe, resolved_yaml
from lora_cli.recipe.schema import Recipe, objective_of, seconds_of
from lora_cli.runs.check import check_rows
from lora_cli.runs.decision import decision
from lora_cli.runs.folder import RunFolder
from lora_cli.runs.history import INTERRUPTED, read_history
from lora_cli.runs.metering import metered, recompute_now
from lora_cli.runs.parts import Rows, Run
from lora_cli.runs.proof_rows import write_proof_rows
from lora_cli.runs.record import Record, closed, described, opened, write_record
from lora_cli.runs.report import tell_end, told_if_broken_off, write_report
from lora_cli.runs.resume import LAYOUT, Continuation, comparable, continuation, is_complete, shared
from lora_cli.runs.rows import load_rows, new_head, planned, recipe_tokenizer
from lora_cli.runs.trained import every_weight, with_adapter
from lora_cli.train import auto
from lora_cli.train.checkpoint import Learned, folder_name, load_learned, restore, save_checkpoint, set_damaged_aside
from lora_cli.train.events import Complete, Event, Finished, Interrupted, OutOfMemory, Resumed, Started
from lora_cli.train.layout import Layout
from lora_cli.train.loop import Actions, Measured, Parts, Settings, train
from lora_cli.train.memory import StartAgain
from lora_cli.train.optim import OptimizerState, make_optimizer, optimizer_state
from lora_cli.train.parallel import agree, local_rank, make_accelerator, on_first
from lora_cli.train.progress import Progress
from lora_cli.train.ranks import Ranks
from lora_cli.train.rewind import Rewind
from lora_cli.train.schedule import make_schedule
from lora_cli.train.sharded import check_can_be_sharded, shard, sharded_modules
from lora_cli.train.sharding import Sharding, asked_for
from lora_cli.train.sinks import Sink, open_sinks
from lora_cli.train.task import Learn, Learning, Task
from lora_cli.train.trackers import Tracked, check_trackers
from lora_cli.train.watch import GiveUp, Watch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def prepare(
    loaded: LoadedRecipe,
    folder: RunFolder,
    progress: OnTokenized | None = None,
    *,
    resume: bool = False,
    load: LoadModel | None = None,
) -> Run:
    """Make the parts of a run. What needs no weights comes first, so that mistakes are found in seconds.

    With `resume`, a start that is computed from rows is not computed again. `load` makes the model, for several runs
    perhaps over one base.
    """
    recipe = loaded.recipe
    check_trackers(recipe.training.trackers)
    device = default_device(local_rank())
    dtype = _training_dtype(recipe, device)
    accelerator = make_accelerator()
    sharding = _sharding(recipe)
    with accelerator.local_main_process_first():
        base = resolve_base(recipe.model.base, recipe.model.revision)
    identity = fingerprint(base.folder)
    tokenizer = recipe_tokenizer(recipe, base.folder)
    rows = load_rows(loaded, tokenizer, progress)
    check_rows(loaded, base, tokenizer, rows)
    training = recipe.training
    head = new_head(training, rows.labels, tokenizer.pad_token_id)
    # on the CPU the files are mapped: once for all processes of a machine
    model = _base_model(recipe, base, head, dtype=dtype, device="cpu" if sharding else device, load=load)
    if training.full:
        trained = every_weight(model)
    else:
        trained = with_adapter(
            model,
            recipe,
            base=base,
            tokenizer=tokenizer,
            rows=rows,
            head=head,
            resumed=folder.checkpoints if resume else None,
        )
    if sharding:
        checkpoint_activations(model, auto.gradient_checkpointing(training, device))
        shard(model, sharding, device)
    with disabled(model):  # what is probed is the base
        packed = _packed(recipe, rows, model)
    decided = decision(
        recipe,
        rows.all,
        model,
        dtype=dtype,
        device=device,
        packed=packed,
        biases=trained.budget.biases,
        sharded=sharding is not None,
        accelerator=accelerator,
    )
    if not sharding:
        checkpoint_activations(model, decided.recompute)
    frozen = frozen_digest(model)
    if training.full:
        model.requires_grad_(True)
    return Run(
        loaded=loaded,
        folder=folder,
        base=base,
        fingerprint=identity,
        tokens=tokenizer_identity(tokenizer),
        tokenizer=tokenizer,
        rows=rows,
        model=model,
        config=trained.config,
        transposed=trained.transposed,
        budget=trained.budget,
        plan=planned(recipe, rows),
        settings=_settings(recipe, rows, decided.layout),
        decision=decided,
        dtype=dtype,
        accelerator=accelerator,
        frozen=frozen,
        start=trained.start,
    )


def execute(
    run: Run,
    *,
    resume: bool = False,
    allow_change: Collection[str] = (),
    asked_to_stop: Callable[[], bool] = lambda: False,
    give_up: GiveUp | None = None,
    shortage: OutOfMemory | None = None,
    learn: Learn | None = None,
) -> Iterator[Event]:
    """Train; yield what happens. Files are written by the first process alone.

    Ends with Finished; with Interrupted where it was asked to stop; with Complete alone where there is nothing to resume.
    With `give_up`, several processes look after each other: it is called, on a thread, where one of them hangs, or can't
    go on while the others wait for it. A `shortage` of memory ended the session before: its forwards are taken from here
    on. `learn` makes the forwards of a run that trains together with others.
    """
    parts, first = _parts(run, asked_to_stop, learn), run.accelerator.is_main_process
    if resume:
        on_first(run.accelerator, lambda: set_damaged_aside(run.folder.checkpoints))
    found = continuation(run, allow_change) if resume else None
    settings = comparable(run)
    progress = _restored(run, parts, found) if found else Progress()
    if shortage:
        progress.layout = Layout(shortage.micro_batch_size, shortage.row_length)
    agree(run.accelerator, {"the step": progress.step} | shared(settings))
    if found and is_complete(run, found):
        yield Complete(progress.step)
        return
    if first:
        replace_file(run.folder.recipe, resolved_yaml(run.loaded).encode())
        record = opened(run, found)
        write_record(run.folder, record)
        if run.start:
            save_adapter(run.start, run.folder.path / START, transposed=run.transposed)
    events = _events(run, parts, progress, found, settings, shortage)
    with ExitStack() as stack:
        sinks = _sinks(run, record, stack, resumed_at=progress.step if resume else None) if first else []
        watch = stack.enter_context(_watch(run, parts, give_up))
        for event in events:
            if watch:
                watch.note(event)
            for sink in sinks:
                sink(event)
            yield event
    if first and isinstance(event, Interrupted):
        tell_end(run.folder, {"reason": INTERRUPTED})


def finish(run: Run, finished: Finished) -> Learned | None:
    """Save the adapter, read it back, and write the run's record, its page and its card.

    What was there before stays until the adapter is whole. The first process writes, and returns it; all of them gather
    it, and look at what they have of the base. Raises for an adapter that does nothing or is not finite, for a base that
    has changed, and for a file that differs from what was trained. With `training.method: full`, a model takes the
    adapter's place.
    """
    learned = run.learned()
    if not run.recipe.training.full and frozen_digest(run.model) != run.frozen:
        raise RuntimeError("the frozen base has changed during training")
    return on_first(run.accelerator, lambda: _write_result(run, finished, learned))


def _write_result(run: Run, finished: Finished, learned: Learned) -> Learned:
    if finished.adapter_step != finished.step:
        learned = load_learned(run.folder.checkpoints / folder_name(finished.adapter_step))
    draft = draft_of(run.folder.path / "result")
    write, last, proofs = RESULTS[type(learned)]
    written = write(run, learned, draft)
    run.tokenizer.save_pretrained(draft)
    move_into(draft, run.folder.path, last=last)
    history = read_history(run.folder.events)
    write_record(run.folder, closed(run.folder.read_record(), history, result=written, proofs=proofs))
    write_report(run.folder)
    return learned


def _write_adapter(run: Run, adapter: Adapter, draft: Path) -> dict[str, object]:
    (without_start(adapter, run.start) if run.start else adapter).check_alive()
    save_adapter(adapter, draft, transposed=run.transposed)
    write_proof_rows(draft, (row.input_ids for row in (run.rows.held_out or run.rows.train)))
    _check_same(adapter, load_adapter(draft), draft)
    return {"adapter": described(adapter)}


def _write_model(run: Run, tuned: Tuned, draft: Path) -> dict[str, object]:
    tuned.check_finite()
    tuned.copy_into(run.model)  # perhaps of another step than the last
    if frozen_digest(run.model.requires_grad_(False)) == run.frozen:
        fix = "check that the run trained for a step and that its learning rate is above 0"
        raise DivergedError(Problem("training has changed nothing: every weight is the base's", fix=fix))
    save_model(run.model, run.base, draft)
    check_saved(run.model, draft)
    return {"model": {"sha256": weights_digest(draft), "parameters": tuned.parameters}}


class Result(NamedTuple):
    """How what was learned becomes files of the run folder, the one that makes the others count, and what is proved of them."""

    write: Callable[[Run, Any, Path], dict[str, object]]  # -> what the record says of it
    last: str
    proofs: list[str]


RESULTS: dict[type[Learned], Result] = {
    Adapter: Result(
        _write_adapter,
        WEIGHTS,
        [
            "every value finite, some lora_B · lora_A not zero",
            "frozen base unchanged",
            "adapter read back equal to what was trained",
        ],
    ),
    Tuned: Result(
        _write_model,
        MODEL_CONFIG,
        ["every value finite, and some not the base's", "model read back by transformers equal to what was trained"],
    ),
}


def _sinks(run: Run, record: Record, stack: ExitStack, *, resumed_at: int | None) -> list[Sink]:
    """Where events go. What breaks the run off is told on its page, once events.jsonl is closed."""
    stack.enter_context(told_if_broken_off(run.folder))
    training = run.recipe.training
    tracked = Tracked(run.folder.path, record["id"], record["settings"], training.log_steps, resumed_at)
    return stack.enter_context(open_sinks(training.trackers, tracked))


@contextmanager
def _watch(run: Run, parts: Parts, give_up: GiveUp | None) -> Iterator[Watch | None]:
    if give_up is None or parts.ranks.count == 1:
        yield None
        return
    with Watch(parts.ranks.mine, parts.ranks.count, give_up) as watch:
        watch.follow(run.accelerator.unwrap_model(parts.learn.task), sharded_modules(run.model))
        try:
            yield watch
        except StartAgain as error:
            watch.call_off(error)
            raise


def _parts(run: Run, asked_to_stop: Callable[[], bool], learn: Learn | None) -> Parts:
    training = run.recipe.training
    parameters = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(training, parameters)
    return Parts(
        learn=learn or _learning(run),
        optimizer=optimizer,
        parameters=parameters,
        schedule=make_schedule(training, run.plan.steps),
        settings=run.settings,
        accelerator=run.accelerator,
        ranks=Ranks(run.accelerator, asked_to_stop, sharded=isinstance(run.model, InShards)),
        rewind=Rewind() if training.rewind_on_spike else None,
    )


def _learning(run: Run) -> Learning:
    products = run.dtype if run.recipe.training.full and run.dtype != torch.float32 else None
    task = Task(run.model, OBJECTIVES[objective_of(run.recipe.training).kind], products=products).train()
    several = run.accelerator.num_processes > 1 and not isinstance(run.model, InShards)
    return Learning(run.accelerator.prepare(task) if several else task, run.accelerator)


def _restored(run: Run, parts: Parts, found: Continuation) -> Progress:
    """The checkpoint's state put into the parts; what was not allowed to change is as it was."""
    snapshot = restore(found.checkpoint, run.model, parts.optimizer, parts.parameters)
    if parts.rewind:
        parts.rewind.snapshot = snapshot
    progress = found.checkpoint.progress
    if any(key in found.changed for key in LAYOUT):
        progress.layout, progress.recompute, progress.factor = run.settings.layout, None, None
    if "training.gradient_checkpointing" in found.changed:
        progress.recompute = None
    if progress.recompute is not None:
        checkpoint_activations(run.model, progress.recompute)
    return progress


def _events(
    run: Run,
    parts: Parts,
    progress: Progress,
    found: Continuation | None,
    settings: Mapping[str, object],
    shortage: OutOfMemory | None,
) -> Iterator[Event]:
    training = run.recipe.training
    if found:
        yield Resumed(progress.step, found.changed)
    yield Started(
        step=progress.step,
        steps=run.plan.steps,
        rows=len(run.rows.train),
        parameters=run.budget.trainable,
        micro_batch_size=(progress.layout or run.settings.layout).micro_batch_size,
        processes=run.accelerator.num_processes,
        gradient_checkpointing=setting_of(recompute_now(run, progress)),
        predicted_bytes=run.decision.planned.memory.total if run.decision.planned else None,
    )
    if shortage:
        yield shortage
    stepping = train(
        parts,
        steps(run.rows.train, run.plan, seed=training.seed, start=progress.step),
        last_step=run.plan.steps,
        actions=_actions(run, parts, progress, settings),
        progress=progress,
        rehearsal=_rehearsal(run) if auto.rehearses(run.accelerator.device) else None,
    )
    # what is measured is a step of this run alone
    yield from metered(stepping, run, parts.optimizer, progress) if isinstance(parts.learn, Learning) else stepping


def _rehearsal(run: Run) -> list[Example]:
    """The rows of the step that has the longest example of the run."""
    train = Examples.of(run.rows.train)
    every = places(train, run.plan, seed=run.recipe.training.seed)
    return list(train.take(max(every, key=lambda taken: train.lengths[taken].max())))


def _actions(run: Run, parts: Parts, progress: Progress, settings: Mapping[str, object]) -> Actions:
    training, ranks = run.recipe.training, parts.ranks
    task, measure = run.accelerator.unwrap_model(parts.learn.task), MEASURES.get(objective_of(training).kind)

    def evaluate() -> Measured:
        found = held_out_loss(task, run.rows.held_out, progress.layout, run.accelerator, measure, between=ranks.go_on)
        return Measured(found.loss, found.tokens, found.sources, found.metrics)

    def sample() -> dict[str, str]:
        # the processes answer at paces of their own, and meet when all are done
        between = ranks.go_on if ranks.count == 1 else lambda: None
        form = PromptForm(run.rows.report.format, run.recipe.data.template)
        answers = answer(
            run.model,
            run.tokenizer,
            training.sample_prompts,
            form=form,
            between=between,
            together=isinstance(run.model, InShards),
        )
        ranks.go_on()
        return answers

    def save(progress: Progress) -> str:
        # shards are gathered by all processes, and written by one
        learned = run.learned()
        state = optimizer_state(parts.optimizer, parts.parameters)
        on_first(run.accelerator, lambda: write(progress, learned, state))
        return str(run.folder.checkpoints)

    def write(progress: Progress, learned: Learned, state: OptimizerState) -> None:
        run.folder.check_ours()
        save_checkpoint(
            run.folder.checkpoints,
            progress,
            learned,
            state,
            settings=settings,
            transposed=run.transposed,
            keep=training.keep_checkpoints,
            spare=progress.kept_step if training.keep_best else None,
            snapshot=parts.rewind.snapshot if parts.rewind else None,
        )

    return Actions(evaluate if run.rows.held_out else None, sample if training.sample_prompts else None, save)


def _base_model(
    recipe: Recipe,
    base: Base,
    head: Head | None,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    load: LoadModel | None,
) -> "PreTrainedModel":
    """The model that is trained, or trained beside. One whose every weight is trained is float32, and shared with nobody."""
    full = recipe.training.full
    return (load_model if full else load or load_model)(
        base,
        dtype=torch.float32 if full else dtype,
        quantize=recipe.model.quantize,
        attention=recipe.model.attention,
        device=device,
        head=head,
    )


def _packed(recipe: Recipe, rows: Rows, model: "PreTrainedModel") -> bool:
    if rows.labels and recipe.data.packing and "packing" in recipe.data.model_fields_set:
        log.info("rows are not packed: each is classified by itself")
    return recipe.data.packing and not rows.labels and packs(model)


def _settings(recipe: Recipe, rows: Rows, layout: Layout) -> Settings:
    training = recipe.training
    return Settings(
        layout=layout,
        seed=training.seed,
        max_grad_norm=training.max_grad_norm,
        eval_steps=training.eval_steps,
        save_steps=training.save_steps,
        max_seconds=None if training.max_time is None else seconds_of(training.max_time),
        patience=training.early_stopping_patience,
        keep_best=training.keep_best,
        sources=sources_in(rows.train),
    )


def _sharding(recipe: Recipe) -> Sharding | None:
    """What the launcher asks for. A process by itself is no worker, and has nobody to share the base with."""
    sharding = asked_for() if torch.distributed.is_initialized() else None
    if sharding:
        check_can_be_sharded(recipe)
    return sharding


def _training_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    if recipe.model.dtype == "float16":
        raise RecipeError(
            Problem(
                "`model.dtype: float16` can't be trained: its gradients underflow without loss scaling",
                fix="use `model.dtype: auto`, which is bfloat16 where the hardware has it and float32 otherwise",
            )
        )
    return resolve_dtype(recipe.model.dtype, device)


def _check_same(trained: Adapter, saved: Adapter, folder: Path) -> None:
    if saved.digest() != trained.digest():
        raise ModelError(
            Problem(
                "what was saved is not what was trained",
                where=str(folder),
                fix="resume from the last checkpoint; check the disk",
            )
        )
