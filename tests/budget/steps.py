"""A forward and backward of a tiny model with adapters, beside what the formulas say of it."""

import json
from dataclasses import dataclass

import torch
from tiny import tiny_model
from torch import Tensor, nn

from lora_cli.budget.activations import How
from lora_cli.budget.modules import biases_of
from lora_cli.budget.params import adapted_linears
from lora_cli.budget.quantised import quantised_by
from lora_cli.budget.shapes import shape_of
from lora_cli.budget.step import Batch, Setup
from lora_cli.data.collate import collate
from lora_cli.data.types import Example, RowId
from lora_cli.kernels.products import is_emulated
from lora_cli.kernels.sizes import LOGITS_AT_ONCE
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.inject import inject, linears
from lora_cli.lora.targets import choose_targets
from lora_cli.lora.weights import stored_in
from lora_cli.models.load import head_paths
from lora_cli.models.recompute import checkpoint_activations
from lora_cli.objectives.sft import sft
from lora_cli.train.meter import measured

ROWS, LENGTH = 2, 48


@dataclass
class TinyStep:
    model: nn.Module
    tensors: dict
    setup: Setup
    batch: Batch

    def loss(self) -> Tensor:
        return sft(self.model, self.tensors).total

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]


def tiny_step(
    model: str | nn.Module,
    *,
    dtype=torch.float32,
    packed=False,
    targets="all-linear",
    recompute=0,
    attention=None,
    dropout=0.0,
    **config,
) -> TinyStep:
    model = tiny_model(model, dtype=dtype) if isinstance(model, str) else model
    if attention:
        model.set_attn_implementation(attention)
    shape = shape_of(json.loads(model.config.to_json_string()))
    biases = biases_of(model, "all") if config.get("bias") == "all" else None
    lora = LoRAConfig(r=4, lora_alpha=4, target_modules=(), lora_dropout=dropout, **config)
    inject(model, lora, choose_targets(targets, list(linears(model)), head=head_paths(model)))
    checkpoint_activations(model.train(), recompute)
    rows = [[_example(LENGTH // 2)] * 2 if packed else [_example(LENGTH)]] * ROWS
    tensors = collate(rows)
    quantised = quantised_by(shape.config)
    how = How(
        number=dtype.itemsize,
        attention=model.config._attn_implementation,
        masked=packed,
        dropout=dtype.itemsize if dropout else 0,
        use_dora=lora.use_dora,
        widened=is_emulated(dtype, torch.device("cpu")),
        logits_at_once=LOGITS_AT_ONCE["cpu"],
        freeze_A=lora.freeze_A,
        holds_inputs=quantised is not None and quantised.holds_inputs,
    )
    adapted = tuple(adapted_linears(shape, targets))
    setup = Setup(shape, adapted, lora, how, quantised, biases=biases, tokens=len(lora.trainable_tokens))
    return TinyStep(model, tensors, setup, Batch(ROWS, LENGTH, ROWS * tensors["positions"].numel()))


def peak_bytes(step: TinyStep) -> int:
    """Of a second step, gradients of a first forward and the optimizer's state being there."""
    optimizer = torch.optim.AdamW(step.trained, fused=True)
    step.loss().backward()
    optimizer.step()
    state = [tensor for values in optimizer.state.values() for tensor in values.values()]
    weights = [tensor for module in step.model.modules() for tensor in stored_in(module)]
    held = [*weights, *step.model.buffers(), *(p.grad for p in step.trained), *state]
    with measured(torch.device("cpu"), held) as peak:
        step.loss().backward()
        optimizer.step()
    return peak.bytes


def _example(length: int) -> Example:
    ids = [5 + i % 200 for i in range(length)]
    return Example(ids, [0.0] * (length // 2) + [1.0] * (length - length // 2), RowId("a.jsonl", 1))
