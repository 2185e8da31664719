"""The held-out loss against transformers' own logits."""

import pytest
import torch
from accelerate import Accelerator
from tiny import CONFIGS, tiny_model

from lora_cli.data.types import Example, RowId
from lora_cli.evaluate.loss import HeldOut, held_out_loss
from lora_cli.objectives.sft import sft
from lora_cli.train.layout import Layout
from lora_cli.train.task import Task

ROWS = [
    Example([5, 17, 200, 31, 8], [0, 0, 1, 1, 1], RowId("a", 1)),
    Example([7, 300], [0, 1], RowId("a", 2)),
    Example([9, 2, 2, 2, 64, 90, 41, 12], [0, 0.5, 0, 1, 0, 0, 2, 1], RowId("a", 3)),
]


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def measured(model, accelerator, rows=ROWS, size=2) -> HeldOut:
    return held_out_loss(Task(model, sft), rows, Layout(size), accelerator)


def by_hand(model) -> float:
    """Σ weight · nll / Σ weight, row by row without padding."""
    nll = items = 0.0
    with torch.no_grad():
        for row in ROWS:
            logps = model(input_ids=torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)
            for place, weight in enumerate(row.weights):
                if weight:
                    nll, items = nll - weight * logps[place - 1, row.input_ids[place]].item(), items + weight
    return nll / items


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_sum_over_all_rows_divided_once(name, accelerator):
    model = tiny_model(name)

    found = measured(model, accelerator)

    assert found.loss == pytest.approx(by_hand(model), rel=1e-6)
    assert (found.tokens, found.rows) == (8, 3)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_it_does_not_depend_on_the_batches(size, accelerator):
    model = tiny_model("llama")

    assert measured(model, accelerator, size=size).loss == pytest.approx(
        measured(model, accelerator, size=1).loss, rel=1e-7
    )


def test_dropout_is_off_and_every_modules_own_mode_comes_back(accelerator):
    model = tiny_model("gpt2")
    quiet = measured(model, accelerator).loss
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]

    assert measured(model, accelerator).loss == quiet
    assert [module.training for module in model.modules()] == modes


def test_the_modes_come_back_after_an_error_too(accelerator):
    model = tiny_model("llama").train()

    with pytest.raises(IndexError):
        measured(model, accelerator, rows=[Example([5, 9999], [0, 1], RowId("a", 1))])

    assert all(module.training for module in model.modules())


def test_perplexity_is_its_exponential_and_finite_for_any_finite_loss():
    assert HeldOut(2.0, 1, 1).perplexity == pytest.approx(7.389, rel=1e-3)
    assert HeldOut(1e6, 1, 1).perplexity < float("inf")
