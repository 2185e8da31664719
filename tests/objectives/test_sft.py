"""The objective of supervised fine-tuning: a sum over tokens, each by its own weight."""

import pytest
import torch
from tiny import tiny_model

from lora_cli.data.collate import collate
from lora_cli.data.types import Example, RowId
from lora_cli.objectives.base import by_source
from lora_cli.objectives.sft import sft

ROWS = [
    Example([3, 4, 5, 6], [0.0, 0.0, 1.0, 0.5], RowId("rows", 1)),
    Example([7, 8, 9, 10, 11, 12], [0.0, 2.0, 0.0, 1.0, 1.0, 0.25], RowId("others", 2)),
]


@pytest.fixture(params=[True, False], ids=["frozen", "trained"])
def model(request):
    """Behind a frozen head the loss makes its logits itself; one that is trained makes them all."""
    return tiny_model("llama").requires_grad_(not request.param)


def weighted_nats(model, row: Example) -> float:
    """The formula, token by token, on the row alone."""
    logps = model(input_ids=torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)
    pairs = enumerate(zip(row.input_ids, row.weights, strict=True))
    return sum(-weight * float(logps[place - 1, token]) for place, (token, weight) in pairs if weight)


@torch.no_grad()
def test_the_loss_is_the_sum_of_each_tokens_nats_by_its_weight(model):
    found = sft(model, collate([[row] for row in ROWS]))

    assert float(found.total) == pytest.approx(sum(weighted_nats(model, row) for row in ROWS), rel=1e-5)


@torch.no_grad()
def test_where_sources_are_told_apart_the_loss_is_the_same_and_each_source_has_its_own(model):
    batch = collate([[row] for row in ROWS], ["others", "rows"])

    found = sft(model, batch)

    [of_sources] = found.metrics.values()
    expected = [weighted_nats(model, row) for row in reversed(ROWS)]
    assert of_sources.tolist() == pytest.approx(expected, rel=1e-5)
    assert float(found.total) == pytest.approx(sum(expected), rel=1e-5)


def test_a_loss_of_one_source_that_is_not_finite_stays_with_it():
    losses, of_source = (
        torch.tensor([1.0, float("nan"), 2.0]),
        torch.tensor([[True, False, True], [False, True, False]]),
    )

    found = by_source(losses, of_source)

    assert found[0] == 3.0
    assert found[1].isnan()
