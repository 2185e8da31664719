"""Every key of a recipe: its type, default, limits, and one sentence on what it does. This is their only home.

From here come the reader's checks, `--set`, docs/recipe.md, the JSON Schema for editors, and the wording of errors.
The models are frozen and know no YAML; `reader.py` gives values their place in the file.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from inspect import isclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator
from pydantic.fields import FieldInfo

from lora_cli.lora.config import CAUSAL_LM, LoRAConfig
from lora_cli.lora.targets import ALL_LINEAR
from lora_cli.recipe.template import parse_template

NonEmpty = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
EveryKth = Annotated[int, Field(ge=2)]
PositiveNumber = Annotated[float, Field(gt=0)]
Several = Annotated[list[NonEmpty], Field(min_length=1)]

# transformers' schedules that are functions of the step alone and need nothing but warm-up and total steps
Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]

Format = Literal["auto", "text", "completion", "alpaca", "messages", "sharegpt", "preference", "tokens", "labelled"]


NO_LABELS = ("0", "1")  # of a head that must be counted before its labels are known


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Model(Block):
    """The base model: what is loaded, and how it is held in memory."""

    base: NonEmpty = Field(
        description="Hub id or folder of the pretrained model; a folder is relative to the current one.",
        examples=["HuggingFaceTB/SmolLM2-135M-Instruct"],
    )
    revision: NonEmpty | None = Field(
        None,
        description="Branch, tag or commit on the hub; the commit it resolves to is always recorded.",
        examples=["main"],
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Number format of the frozen weights; `auto` takes bfloat16 where the hardware computes in it and "
        "float32 otherwise. The adapter is always float32.",
    )
    quantize: Literal["none", "int8", "nf4"] = Field(
        "none",
        description="Storage of the frozen weights; `nf4` (QLoRA) needs about a quarter of the memory of 16 bits, "
        "`int8` half, both at some speed and precision.",
    )
    attention: Literal["auto", "eager", "sdpa", "flash", "flex"] = Field(
        "auto", description="Attention kernel; `auto` takes what transformers prefers for the model, mostly `sdpa`."
    )


class LoRA(Block):
    """The adapter: how large it is, where it sits, how it starts."""

    r: Positive = Field(8, description="Rank of the update; trainable parameters grow as r × (in + out) per module.")
    alpha: PositiveNumber | None = Field(
        None,
        description="Strength of the update, scale = alpha / r; null means 2 × r, so that r may change alone.",
        examples=[16],
    )
    targets: NonEmpty | Several = Field(
        ALL_LINEAR,
        description="Modules that get an adapter: letters (`qv`: q k v o attention, g u d MLP), a list of module names "
        "or patterns, or `all-linear`; fewer targets train fewer parameters.",
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of the adapter's inputs zeroed while training; helps on small data."
    )
    use_rslora: bool = Field(
        False, description="Scale by alpha / √r instead of alpha / r, which keeps large ranks learning."
    )
    use_dora: bool = Field(
        False, description="Learn a magnitude per output beside the direction (DoRA); better at low rank, slower."
    )
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva"] = Field(
        "default",
        description="How A and B start; `pissa` and `olora` in the base weight's own directions, `loftq` where they make "
        "good what quantising took from the base, `eva` where the inputs of the training rows vary most; `default` and "
        "`gaussian` with a random A and B = 0.",
    )
    eva_rho: Annotated[float, Field(ge=1)] = Field(
        2.0,
        description="With `init: eva`, the rank of a module is up to this many times `r`, and the sum of all ranks stays; "
        "1 gives every module `r`.",
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        "none",
        description="Biases trained beside A and B: those of the adapted modules (`lora_only`), or all of the model; they "
        "are in the adapter's file, and take no rank.",
    )
    freeze_A: bool = Field(
        False,
        description="Train B alone and leave A where it starts (LoRA-FA): half the trained parameters, and the inputs of "
        "the adapted modules need not be kept for A's gradient.",
    )
    start_from: NonEmpty | None = Field(
        None,
        description="Folder of an adapter that a new run begins at, of the same base, targets, rank and scale; a folder "
        "is relative to the current one. `--resume` is another thing: it continues a run.",
        examples=["out-1/"],
    )
    exclude: list[NonEmpty] = Field(
        [],
        description="Module names or patterns taken out of `targets`; they stay as in the base.",
        examples=[["down_proj"]],
    )
    layers: Annotated[list[Index], Field(min_length=1)] | None = Field(
        None,
        description="Numbers of the transformer blocks to adapt, from 0; null adapts all of them.",
        examples=[[0, 1, 2]],
    )
    rank_pattern: dict[str, Positive] = Field(
        {},
        description="Another rank for modules whose path ends in the pattern; the first match wins.",
        examples=[{"q_proj": 16}],
    )
    alpha_pattern: dict[str, PositiveNumber] = Field(
        {},
        description="Another alpha for modules whose path ends in the pattern; the first match wins.",
        examples=[{"q_proj": 32}],
    )
    trainable_tokens: list[NonEmpty] = Field(
        [],
        description="Tokens of the tokenizer whose rows of the embedding, and of the head, are trained beside A and B, without "
        "the rest of the table: special and reserved ones that the base has hardly seen.",
        examples=[["<|reserved_special_token_0|>"]],
    )
    new_tokens: list[NonEmpty] = Field(
        [],
        description="Special tokens to add to the tokenizer; each gets a row in the embedding and in the head, which starts at "
        "the mean of the others and is trained beside A and B.",
        examples=[["<tool>", "</tool>"]],
    )
    modules_to_save: list[NonEmpty] = Field(
        [],
        description="Modules trained whole beside the LoRA layers, by name or pattern: embeddings, the head, norms; "
        "they are in the adapter's file in full. The head of `objective: classify` is trained so by itself.",
        examples=[["lm_head"]],
    )

    @property
    def tokens_with_rows(self) -> list[str]:
        """The tokens whose rows of the tables are trained."""
        return [*self.trainable_tokens, *self.new_tokens]

    @property
    def effective_alpha(self) -> float:
        return float(2 * self.r if self.alpha is None else self.alpha)

    def config(
        self,
        target_modules: tuple[str, ...] = (),
        *,
        target_parameters: tuple[str, ...] = (),
        modules_to_save: tuple[str, ...] = (),
        trainable_tokens: tuple[int, ...] = (),
        task_type: str = CAUSAL_LM,
        base: str | None = None,
        revision: str | None = None,
    ) -> LoRAConfig:
        """The adapter that this block describes, once its targets are known; `.scale` is its effective scale."""
        return LoRAConfig(
            r=self.r,
            lora_alpha=self.effective_alpha,
            target_modules=target_modules,
            lora_dropout=self.dropout,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            bias=self.bias,
            freeze_A=self.freeze_A,
            rank_pattern=self.rank_pattern,
            alpha_pattern=self.alpha_pattern,
            base_model_name_or_path=base,
            revision=revision,
            task_type=task_type,
            target_parameters=target_parameters,
            modules_to_save=modules_to_save,
            trainable_tokens=trainable_tokens,
        )


class Source(Block):
    """An entry of `data.train` that needs more than a path or hub id."""

    source: NonEmpty = Field(
        description="A path (relative to the recipe) or a hub id.",
        examples=["train.jsonl"],
    )
    weight: PositiveNumber | None = Field(
        None,
        description="How often an epoch takes each row of it, 1 where nothing is said; of a fraction, each epoch takes "
        "other rows.",
        examples=[2.0],
    )
    share: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Its share of an epoch, which has as many rows as all sources together; every source has one, and "
        "they sum to 1.",
        examples=[0.3],
    )
    split: NonEmpty = Field("train", description="Split of a dataset on the hub; `train[:10%]` takes a part of it.")
    config: NonEmpty | None = Field(
        None, description="Configuration (subset) of a dataset on the hub.", examples=["en"]
    )
    revision: NonEmpty | None = Field(
        None, description="Branch, tag or commit of a dataset on the hub.", examples=["main"]
    )
    format: Format | None = Field(
        None, description="How its rows are read; null goes by `data.template` or `data.format`.", examples=["messages"]
    )
    columns: dict[str, NonEmpty] | None = Field(
        None,
        description="What its file calls the columns of a format; null takes `data.columns`.",
        examples=[{"prompt": "question"}],
    )


def _kind_of_train(value: Any) -> str:
    return "<list>" if isinstance(value, list | dict) else "<text>"


def _kind_of_entry(value: Any) -> str:
    return "<source>" if isinstance(value, dict | Source) else "<text>"


# The kind is chosen before its keys are checked, so that a mistake in one is told once and by its own name
Entry = Annotated[
    Annotated[NonEmpty, Tag("<text>")] | Annotated[Source, Tag("<source>")], Discriminator(_kind_of_entry)
]
Sources = Annotated[
    Annotated[NonEmpty, Tag("<text>")] | Annotated[list[Entry], Field(min_length=1), Tag("<list>")],
    Discriminator(_kind_of_train),
]


class Data(Block):
    """The rows: where they are, how they read, how long they may be."""

    train: Sources = Field(
        description="A path (jsonl, json, csv, parquet, txt, also as gz or zst; relative to the recipe), a hub id, or "
        "a list of them; an entry of the list may be a block of keys, such as `{source: a.jsonl, weight: 2}`.",
        examples=["train.jsonl"],
    )
    eval: NonEmpty | None = Field(
        None,
        description="Held-out rows: a path, a hub id, or a share of train such as `5%`; null measures nothing.",
        examples=["5%"],
    )
    format: Format = Field(
        "auto", description="How a row is read; `auto` finds it from the columns and says which it took."
    )
    columns: dict[str, NonEmpty] = Field(
        {},
        description="What the files call the columns of a format, where they have other names.",
        examples=[{"prompt": "question", "completion": "answer"}],
    )
    template: NonEmpty | None = Field(
        None,
        description="Text made of a row's columns, in place of a format: `{name}` is a column, `[[…]]` is trained, and "
        "an end token follows; `{{` and `}}` are braces.",
        examples=["Q {question} A [[{answer}]]"],
    )
    train_on: Literal["answers", "last", "all"] = Field(
        "answers",
        description="What is learned: every answer, the last one of a conversation, or all tokens up to the last "
        "answer, prompts too.",
    )
    bad_rows: Literal["error", "skip"] = Field(
        "error",
        description="What becomes of rows that cannot be used; `skip` leaves them out with a warning, and above 5 % it "
        "is an error all the same.",
    )
    max_length: int = Field(
        2048, ge=2, description="Tokens of a row at most; longer rows are cut, and how many were is reported."
    )
    packing: bool = Field(
        True,
        description="Put several rows into one, so that no time goes into padding; they never see each other, and "
        "losses and steps are those of unpacked rows. Rows that are classified are not packed.",
    )

    @field_validator("template")
    @classmethod
    def _is_a_template(cls, text: str | None) -> str | None:
        if text is not None:
            parse_template(text)
        return text


class Sft(Block):
    """Cross-entropy on the answers."""

    kind: Literal["sft"] = "sft"


class Classify(Block):
    """Cross-entropy on the labels of rows, by a head that is trained whole."""

    kind: Literal["classify"] = Field(
        description="`classify` learns the `label` of each row's `text`.", examples=["classify"]
    )
    labels: Annotated[list[NonEmpty], Field(min_length=2)] | None = Field(
        None,
        description="The labels in the order of the head's outputs; null takes those of the training rows, sorted.",
        examples=[["ham", "spam"]],
    )


def _kind_of_objective(value: Any) -> str:
    return "<options>" if isinstance(value, dict | Block) else "<name>"


Objective = Annotated[
    Annotated[Literal["sft", "classify"], Tag("<name>")] | Annotated[Classify, Tag("<options>")],
    Discriminator(_kind_of_objective),
]


class Training(Block):
    """The run: for how long, how fast, in what batches, and what is kept on the way."""

    method: Literal["lora", "full"] = Field(
        "lora",
        description="What is trained: `lora` an adapter, `full` every weight of the base, in float32; `full` is there to "
        "compare LoRA with, takes many times the memory, and writes a model in place of an adapter.",
    )
    objective: Objective = Field(
        "sft",
        description="What is minimised; `sft` is cross-entropy on the answers, `classify` on the labels of rows; a "
        "block such as `{kind: classify, labels: [ham, spam]}` gives it options.",
    )
    epochs: PositiveNumber = Field(
        3,
        description="Passes over the training rows; may be a fraction. Raised with `--resume` it extends a run: from "
        "there on the learning rate follows the schedule of the longer run.",
    )
    max_steps: Positive | None = Field(
        None, description="Optimizer steps, whatever `epochs` says; the schedule ends with them.", examples=[1000]
    )
    max_time: str | None = Field(
        None,
        description="Stop and save after this long (`2h`, `90m`, `45s`, `1h30m`), whatever is left; the schedule does "
        "not shrink to it.",
        examples=["2h"],
    )
    learning_rate: PositiveNumber = Field(
        2e-4, description="Peak step size; LoRA takes about ten times that of full fine-tuning."
    )
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] = Field(
        1.0,
        description="How many times `learning_rate` B learns with (LoRA+); 1 is plain LoRA, the paper takes 16 with a "
        "lower `learning_rate`.",
        examples=[16],
    )
    lr_scheduler: Schedule = Field(
        "cosine", description="Course of the learning rate after warm-up; `constant` has neither warm-up nor decay."
    )
    warmup_ratio: float = Field(
        0.03, ge=0, le=1, description="Share of the steps over which the learning rate rises from zero."
    )
    global_batch_size: Positive = Field(
        16,
        description="Rows per optimizer step over all devices; accumulation is derived from it, so results don't "
        "depend on the number of devices.",
    )
    micro_batch_size: Literal["auto"] | Positive = Field(
        "auto", description="Rows per forward on one device; changes memory and speed, never the gradients."
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        "adamw",
        description="AdamW and its bitsandbytes forms: `8bit` keeps its state in a quarter of the memory, `paged` "
        "moves it to host memory when the device is full.",
    )
    weight_decay: float = Field(
        0.0, ge=0, description="Pull of the trained parameters towards zero at each step; biases are not pulled."
    )
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients of a larger norm are scaled down to it; 0 clips nothing."
    )
    gradient_checkpointing: Literal["auto", "mlp"] | bool | EveryKth = Field(
        "auto",
        description="Compute activations again in the backward pass instead of keeping them: of every block (`true`: far "
        "less memory, about a third more time), of their MLPs (`mlp`), or of every k-th block (a number); `auto` takes "
        "the fastest that fits the free memory.",
    )
    seed: int = Field(
        42, ge=0, le=2**32 - 1, description="Fixes the start of A, the order of rows, dropout and samples."
    )
    eval_steps: Positive | None = Field(
        None,
        description="Steps between evaluations on `data.eval`; null evaluates before the first step and after the last "
        "only.",
        examples=[100],
    )
    save_steps: Positive | None = Field(
        100, description="Steps between checkpoints, the most that a crash can cost; null saves at the end only."
    )
    keep_checkpoints: int = Field(
        2, ge=2, description="The newest checkpoints that stay on disk; two, so that a damaged one has a predecessor."
    )
    log_steps: Positive = Field(1, description="Steps between lines in the console and in the trackers.")
    early_stopping_patience: Positive | None = Field(
        None,
        description="Stop after this many evaluations in a row without a lower loss; needs `data.eval` and "
        "`eval_steps`. The adapter is the last one; with `keep_best`, the best.",
        examples=[3],
    )
    keep_best: bool = Field(
        False,
        description="The result is the adapter of the step with the lowest held-out loss, not of the last; its checkpoint "
        "stays on disk. Needs `data.eval` and `eval_steps`.",
    )
    rewind_on_spike: bool = Field(
        False,
        description="Where a gradient is 20 times the usual or not finite, put back the weights of up to 20 steps ago and "
        "go on with the next rows; costs a copy of adapter and optimizer in memory and in each checkpoint.",
    )
    sample_prompts: list[NonEmpty] = Field(
        [],
        description="Prompts answered at each evaluation, to read what the loss cannot say; each costs a generation. "
        "Where `data.template` has several fields before the answer, each is JSON with a text for each field.",
        examples=[["What is a hacker?"]],
    )
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        [],
        description="Where curves and samples go besides events.jsonl; each needs the extra of its name, and its own "
        "environment variables say where it writes.",
        examples=[["tensorboard"]],
    )

    @property
    def full(self) -> bool:
        """Whether every weight is trained, and no adapter."""
        return self.method == "full"

    @field_validator("max_time")
    @classmethod
    def _is_a_time(cls, text: str | None) -> str | None:
        if text is not None:
            seconds_of(text)
        return text


class Recipe(Block):
    """One run, from base model and rows to an adapter."""

    model: Model
    lora: LoRA = LoRA()
    data: Data
    training: Training = Training()
    output: NonEmpty = Field("out/", description="The run folder, relative to the current one; `--out` overrides it.")


@dataclass(frozen=True)
class Inner:
    """A value of a key that is a block of keys itself: what messages call it, and how deep its keys stand."""

    of: str
    block: type[Block]
    depth: int


# `data.train[0].weight`, `training.objective.labels`
INNER = {"data.train": Inner("a source", Source, 3), "training.objective": Inner("an objective", Classify, 2)}


def inner_of(path: Sequence[str | int]) -> Inner | None:
    """The block inside a value that a path leads into; None for a path that ends before."""
    inner = INNER.get(".".join(map(str, path[:2])))
    return inner if inner and len(path) > inner.depth else None


def inner_field(path: Sequence[str | int]) -> tuple[str, FieldInfo] | None:
    """The key of such a block at a path, and its field; None for any other path, and for a key that it has not."""
    inner = inner_of(path)
    name = str(path[inner.depth]) if inner else ""
    return (name, inner.block.model_fields[name]) if inner and name in inner.block.model_fields else None


@cache
def blocks() -> dict[str, type[Block]]:
    """`model`, `lora`, `data`, `training`: the keys of a recipe that hold keys."""
    types = {name: field.annotation for name, field in Recipe.model_fields.items()}
    return {name: kind for name, kind in types.items() if isclass(kind) and issubclass(kind, Block)}


@cache
def keys() -> dict[str, FieldInfo]:
    """Every key by its dotted name, `model.base` to `output`, in the order of the reference."""
    found: dict[str, FieldInfo] = {}
    for name, field in Recipe.model_fields.items():
        inner = blocks()[name].model_fields if name in blocks() else {}
        found |= {f"{name}.{key}": inner[key] for key in inner} or {name: field}
    return found


def sources_of(train: str | Sequence[str | Source]) -> list[Source]:
    """Each source of `data.train` as a Source, in order."""
    entries = [train] if isinstance(train, str) else train
    return [Source(source=entry) if isinstance(entry, str) else entry for entry in entries]


def objective_of(training: Training) -> Sft | Classify:
    """The objective with its options."""
    named = {"sft": Sft(), "classify": Classify(kind="classify")}
    return named[training.objective] if isinstance(training.objective, str) else training.objective


def labels_of(training: Training) -> tuple[str, ...] | None:
    """What rows are classified as; () where the training rows say it, None where nothing is classified."""
    objective = objective_of(training)
    return tuple(objective.labels or ()) if isinstance(objective, Classify) else None


def seconds_of(time: str) -> int:
    """`2h`, `90m`, `45s`, `1h30m` in seconds. ValueError for anything else, and for no time at all."""
    found = re.fullmatch(r"(?:([0-9]{1,6})h)?(?:([0-9]{1,6})m)?(?:([0-9]{1,6})s)?", time)
    seconds = sum(int(n or 0) * unit for n, unit in zip(found.groups(), (3600, 60, 1), strict=True)) if found else 0
    if seconds == 0:
        raise ValueError("a time such as `2h`, `90m` or `45s`")
    return seconds


def share_of(source: str) -> float | None:
    """0.05 for `5%`; None for what is no share but a path or hub id."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?%", source)
    return float(found[1]) / 100 if found else None
