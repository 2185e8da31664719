"""What an objective returns: sums. The loop divides once, by the items of the whole step on all devices."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from lora_cli.data.types import Batch

BY_SOURCE = "loss by source"  # a metric of every objective: [sources], sums of the loss, where the batch has `sources`


class Loss(NamedTuple):
    """`total` is the sum over the batch's items, in nats; `metrics` are further sums by name, tensors of any shape.

    A named tuple, so that DDP and FSDP, which walk a module's outputs, see its tensors.
    """

    total: Tensor
    metrics: Mapping[str, Tensor]


def without_graph(loss: Loss) -> Loss:
    return Loss(loss.total.detach(), {name: metric.detach() for name, metric in loss.metrics.items()})


Objective = Callable[[nn.Module, Batch], Loss]
Each = Callable[[nn.Module, Sequence[Batch]], list[Loss]]
"""(model, batches) -> the loss of each batch, as the objective has it, of one forward over all"""
Measure = Callable[[Mapping[str, Tensor]], dict[str, float]]
"""(metrics summed over all held-out rows) -> figures by name, such as the accuracy."""


def by_source(losses: Tensor, of_source: Tensor) -> Tensor:
    """[sources]: the sum of the losses [n] of each; `of_source` [sources, n] is bool. One that is not finite stays where it is."""
    return losses.masked_fill(~of_source, 0.0).sum(dim=1)
