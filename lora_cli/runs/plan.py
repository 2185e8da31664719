"""`lora plan`: what a recipe will need and take on a GPU, or on this machine, before anything is downloaded or rented.

Where base and rows are on this machine, their tokens are counted; else rows are taken to be full. torch is imported only
where tokens are counted or this machine's own device is asked about.
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.budget.bases import CATALOGUE, MeasuredBase, local_folder, measure_base
from lora_cli.budget.gpus import GPU, find_gpu, gpu_of_device, smallest
from lora_cli.budget.plan import Lengths, Option
from lora_cli.budget.quantised import Quantised, quantised_by
from lora_cli.budget.speed import Rates
from lora_cli.budget.step import Setup
from lora_cli.data.sources import is_path
from lora_cli.models.base import refuse_twice
from lora_cli.recipe.reader import LoadedRecipe
from lora_cli.recipe.schema import LoRA, Recipe, sources_of
from lora_cli.runs.memory import (
    NUMBER,
    TYPICAL,
    Place,
    attention_of,
    decide,
    free_host_memory,
    lengths_of,
    refuse_without_formula,
    setup_of,
)

if TYPE_CHECKING:
    import torch

# What a process takes of a GPU beside its tensors: CUDA's context, kernels, cuBLAS's workspace. An assumption
CONTEXT = 600_000_000
MEASURED_SECONDS = 0.2


@dataclass(frozen=True)
class Machine:
    """What a plan is made for."""

    name: str
    memory: float  # bytes of one device, all of it
    place: Place
    bfloat16: bool
    timed: bool  # whether the rates are this device's own


@dataclass(frozen=True)
class Way:
    """One way to train: the recipe's, or one to compare it with."""

    name: str
    setup: Setup
    option: Option
    fits: bool
    least: int  # bytes of a GPU that would do, with every block computed again and one row a forward if need be
    smallest: GPU | None
    tokens_per_second: float | None  # of all devices
    seconds: float | None  # of the run where its tokens are known, else of a million tokens
    cost: float | None

    @property
    def rest(self) -> int:
        """What working on a block, the allocator and the device itself take."""
        return self.option.memory.working + self.option.lost

    @property
    def peak(self) -> int:
        return self.option.needed


@dataclass(frozen=True)
class Plan:
    base: MeasuredBase
    machine: Machine
    gpus: int
    lengths: Lengths
    counted: bool  # tokens of the real rows; else rows are taken to be full
    tokens: float  # of the run, or a million
    ways: tuple[Way, ...]


def plan(loaded: LoadedRecipe, *, gpu: str | None = None, gpus: int = 1, price: float | None = None) -> Plan:
    """Of the recipe, on so many of the GPU named, or of this machine's device; `price` is of one GPU and hour."""
    recipe = loaded.recipe
    refuse_without_formula(recipe)
    lora = recipe.lora
    base = measure_base(recipe.model.base, recipe.model.revision, targets=lora.targets, bias=lora.bias)
    if base.source != CATALOGUE:
        refuse_twice(Path(base.source), recipe.model.quantize)
    machine = _catalogued(find_gpu(gpu), gpus) if gpu else _this_machine(recipe, gpus)
    lengths, tokens = _rows(loaded, base)
    counted = tokens is not None
    make = partial(_way, base=base, machine=machine, lengths=lengths, tokens=tokens or 1e6, gpus=gpus, price=price)
    ways = tuple(make(*way) for way in _ways(recipe, quantised_by(base.shape.config)))
    return Plan(base, machine, gpus, lengths, counted, tokens or 1e6, ways)


def _ways(recipe: Recipe, on_disk: Quantised | None) -> list[tuple[str, Recipe]]:
    """(name, recipe): the recipe as it is, and what it is not, with nothing fixed."""
    plain = f"LoRA, {on_disk.name} on disk" if on_disk else "LoRA 16 bit"
    kinds = {"none": plain, "nf4": "QLoRA nf4", "int8": "LoRA int8"}
    open_ = {"micro_batch_size": "auto", "gradient_checkpointing": "auto"}

    def other(method: str, quantize: str = "none") -> Recipe:
        changed = {
            "model": recipe.model.model_copy(update={"quantize": quantize}),
            "training": recipe.training.model_copy(update={**open_, "method": method}),
        }
        return recipe.model_copy(update=changed | ({"lora": LoRA()} if method == "full" else {}))

    own = "full" if recipe.training.full else kinds[recipe.model.quantize]
    ways = {plain: other("lora"), kinds["nf4"]: other("lora", "nf4"), "full": other("full")}
    if on_disk:
        del ways[kinds["nf4"]]  # what is quantised is not quantised again
    return [(f"this recipe ({own})", recipe), *((name, way) for name, way in ways.items() if name != own)]


def _way(
    name: str,
    recipe: Recipe,
    *,
    base: MeasuredBase,
    machine: Machine,
    lengths: Lengths,
    tokens: float,
    gpus: int,
    price: float | None,
) -> Way:
    setup = _setup(recipe, base, machine, lengths)
    option = decide(recipe, setup, lengths, machine.place, packed=recipe.data.packing)
    least = decide(recipe, setup, lengths, replace(machine.place, room=0), packed=recipe.data.packing)
    rate = option.tokens_per_second * gpus if machine.timed else None
    seconds = tokens / rate if rate else None
    return Way(
        name=name,
        setup=setup,
        option=option,
        fits=option.needed <= machine.place.room,
        least=least.needed + CONTEXT,
        smallest=smallest(least.needed + CONTEXT, bfloat16=setup.how.number == 2),
        tokens_per_second=rate,
        seconds=seconds,
        cost=None if price is None or seconds is None else price * gpus * seconds / 3600,
    )


def _setup(recipe: Recipe, base: MeasuredBase, machine: Machine, lengths: Lengths) -> Setup:
    auto = "bfloat16" if machine.bfloat16 else "float32"
    dtype = auto if recipe.model.dtype == "auto" else recipe.model.dtype
    return setup_of(
        recipe,
        base.shape,
        number=NUMBER[dtype],
        attention=attention_of(recipe, base.shape),
        packed=recipe.data.packing,
        kind=machine.place.kind,
        longest=lengths.longest,
        widened=machine.place.kind == "cpu" and not (dtype == "float32" or (dtype == "bfloat16" and machine.bfloat16)),
        biases=base.biases,
    )


def _rows(loaded: LoadedRecipe, base: MeasuredBase) -> tuple[Lengths, float | None]:
    """Of the real rows, with the tokens of the whole run, where rows and tokenizer are on this machine."""
    data = loaded.recipe.data
    folder = local_folder(loaded.recipe.model.base, loaded.recipe.model.revision)
    here = all(is_path(source, loaded.path.parent) for source in sources_of(data.train))
    if not here or folder is None or not (folder / "tokenizer_config.json").is_file():
        return Lengths(data.max_length, data.max_length), None
    from lora_cli.runs.rows import load_rows, planned, recipe_tokenizer

    rows = load_rows(loaded, recipe_tokenizer(loaded.recipe, folder))
    lengths = lengths_of(rows.all)
    steps = planned(loaded.recipe, rows).steps
    return lengths, steps * loaded.recipe.training.global_batch_size * lengths.mean


def _catalogued(gpu: GPU, gpus: int) -> Machine:
    place = Place("cuda", gpu.memory - CONTEXT, gpu.rates, gpus)
    return Machine(gpu.name, gpu.memory, place, gpu.bf16 is not None, timed=True)


def _this_machine(recipe: Recipe, gpus: int) -> Machine:
    import torch

    from lora_cli.kernels.products import has_bfloat16
    from lora_cli.models.load import default_device, resolve_dtype

    device = default_device()
    bfloat16 = has_bfloat16(device)
    if device.type == "cuda":
        name, (free, total) = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)
        known = gpu_of_device(name)
        return Machine(
            name, total, Place("cuda", free, known.rates if known else TYPICAL["cuda"], gpus), bfloat16, bool(known)
        )
    rates = _measured_rates(resolve_dtype(recipe.model.dtype, device))
    return Machine(
        "this machine's CPU", free_host_memory(), Place("cpu", free_host_memory(), rates), bfloat16, timed=True
    )


def _measured_rates(dtype: "torch.dtype") -> Rates:
    """Of this CPU, tried for a moment: a product of matrices, and a copy."""
    import torch

    a = torch.ones(512, 1024, dtype=dtype)
    b = torch.ones(1024, 1024, dtype=dtype)
    big = torch.ones(16_000_000)
    from lora_cli.budget.speed import REACHED_BANDWIDTH, REACHED_FLOPS

    flops = 2 * 512 * 1024 * 1024 * _times_a_second(lambda: a @ b) / REACHED_FLOPS
    moved = 2 * big.nbytes * _times_a_second(big.clone) / REACHED_BANDWIDTH
    return Rates(flops, moved, launches=False)


def _times_a_second(act) -> float:
    act()
    began, count = time.perf_counter(), 0
    while (took := time.perf_counter() - began) < MEASURED_SECONDS:
        act()
        count += 1
    return count / took
