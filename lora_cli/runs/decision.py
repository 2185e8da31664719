"""What `auto` comes to on this device: the layout of a step and its checkpointing, planned where the base has a formula."""

import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from lora_cli.budget.gpus import gpu_of_device
from lora_cli.budget.plan import Lengths, Option
from lora_cli.budget.shapes import shape_of
from lora_cli.budget.speed import Rates
from lora_cli.budget.step import Setup
from lora_cli.data.examples import Examples
from lora_cli.errors import ModelError
from lora_cli.kernels.products import is_emulated
from lora_cli.models.recompute import Recompute
from lora_cli.recipe.schema import Recipe, labels_of
from lora_cli.runs.memory import TYPICAL, Place, decide, free_host_memory, lengths_of, refuse_without_formula, setup_of
from lora_cli.train import auto
from lora_cli.train.layout import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """`setup` and `planned` are None for an architecture without a formula, where rules of thumb decide."""

    layout: Layout
    recompute: Recompute
    setup: Setup | None = None
    planned: Option | None = None
    lengths: Lengths | None = None
    place: Place | None = None
    packed: bool = False

    @property
    def room(self) -> float:
        """Bytes that weights and step may have together."""
        return self.place.room if self.place else float("inf")

    @property
    def fits(self) -> bool:
        return self.planned is None or self.planned.needed <= self.room


def decision(
    recipe: Recipe,
    examples: Examples,
    model: "PreTrainedModel",
    *,
    dtype: torch.dtype,
    device: torch.device,
    packed: bool,
    biases: int | None = None,
    sharded: bool = False,
    accelerator: Accelerator | None = None,
) -> Decision:
    """Of a run over these examples; a model on the meta device stands for one that is still to be loaded.

    `biases` is how many numbers are trained in biases; None: those of the adapted linears, where the recipe has them
    trained. Heads and modules that are trained whole, and bases in shards, have no formula.
    """
    lengths, processes = lengths_of(examples), accelerator.num_processes if accelerator else 1
    if sharded:
        return _by_rule(recipe, lengths.longest, model, device, packed, processes)
    with suppress(ModelError):
        refuse_without_formula(recipe)
        setup = setup_of(
            recipe,
            shape_of(model.config.to_dict()),
            number=dtype.itemsize,
            attention=model.config._attn_implementation,
            packed=packed,
            kind=_kind(device),
            longest=lengths.longest,
            widened=is_emulated(dtype, device),
            biases=biases,
        )
        loaded = 0 if model.device.type == "meta" else setup.weight_bytes
        room = _least(_free(device) + loaded, accelerator)
        place = Place(_kind(device), room, _rates(device), processes)
        found = decide(recipe, setup, lengths, place, packed=packed)
        return Decision(
            Layout(found.micro_batch, found.row_length), found.recompute, setup, found, lengths, place, packed
        )
    return _by_rule(recipe, lengths.longest, model, device, packed, processes)


def calibrated(recipe: Recipe, decided: Decision, layout: Layout, factor: float) -> Decision:
    """The decision once a step has shown that `factor` times as much comes and goes in it as was predicted.

    Checkpointing changes no bit of what is trained, so it is chosen anew, more of it or less. The rows of a forward change
    the order of sums, and what dropout draws: they stay those of `layout` wherever they fit with any checkpointing, though
    others may be faster, and are fewer where they don't.
    """
    again = partial(decide, recipe, decided.setup, decided.lengths, decided.place, packed=decided.packed, factor=factor)
    found = again(forward=(layout.micro_batch_size, layout.row_length))
    if found.needed > decided.room:
        found = again()
    return replace(
        decided, layout=Layout(found.micro_batch, found.row_length), recompute=found.recompute, planned=found
    )


def _by_rule(
    recipe: Recipe, longest: int, model: "PreTrainedModel", device: torch.device, packed: bool, processes: int
) -> Decision:
    config = model.config.get_text_config()
    layout = auto.layout(
        recipe.training,
        longest=longest,
        vocabulary=config.vocab_size if labels_of(recipe.training) is None else config.num_labels,
        processes=processes,
        device=device,
        pack_to=recipe.data.max_length if packed else None,
    )
    return Decision(layout, auto.gradient_checkpointing(recipe.training, device))


def _kind(device: torch.device) -> str:
    return "cuda" if device.type == "cuda" else "cpu"


def _free(device: torch.device) -> float:
    if device.type != "cuda":
        return free_host_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _rates(device: torch.device) -> Rates:
    gpu = gpu_of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.rates if gpu else TYPICAL[_kind(device)]


def _least(room: float, accelerator: Accelerator | None) -> float:
    """Of all processes, so that they decide the same."""
    if accelerator is None or accelerator.num_processes == 1:
        return room
    return accelerator.gather(torch.tensor([room], device=accelerator.device)).min().item()
