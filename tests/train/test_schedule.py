"""The learning rate as a function of the step."""

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from lora_cli.recipe.schema import Schedule, Training
from lora_cli.train.schedule import CURVES, make_schedule

SCHEDULES = Schedule.__args__
STEPS = 40


def test_every_schedule_that_a_recipe_may_name_has_a_curve():
    assert set(CURVES) == set(SCHEDULES)


def peak(name: str, steps: int, warmup_ratio: float) -> list[float]:
    factor = make_schedule(Training(lr_scheduler=name, warmup_ratio=warmup_ratio), steps)
    return [factor(step) for step in range(1, steps + 1)]


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.25])
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_step_is_spent_on_nothing_and_the_peak_is_reached_and_never_passed(name, warmup_ratio):
    factors = peak(name, STEPS, warmup_ratio)

    assert factors[0] > 0
    assert max(factors) == 1.0
    assert all(0 < factor <= 1 for factor in factors)


@pytest.mark.parametrize("name", SCHEDULES)
def test_after_the_warm_up_it_is_transformers_own_curve(name):
    warmup = 10
    idle = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(name, idle, num_warmup_steps=warmup, num_training_steps=STEPS).lr_lambdas[0]

    factors = peak(name, STEPS, warmup / STEPS)

    assert factors[warmup:] == [theirs(step) for step in range(warmup, STEPS)]
    if name != "constant":
        assert factors[:warmup] == [step / warmup for step in range(1, warmup + 1)]


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_shortest_runs_learn_at_the_full_rate_at_least_once(name, steps):
    assert max(peak(name, steps, 0.03)) == 1.0
