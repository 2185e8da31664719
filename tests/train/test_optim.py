"""Optimizers by name, their groups and their state."""

import pytest
import torch
from torch import nn

from lora_cli.recipe.schema import Training
from lora_cli.train.optim import (
    OPTIMIZERS,
    make_optimizer,
    optimizer_state,
    restore_optimizer,
    set_learning_rate,
)

# bitsandbytes says that pages need CUDA; on a CPU its paged optimizers are the plain ones
pytestmark = pytest.mark.filterwarnings("ignore:.*[Pp]aged.*:UserWarning")


def test_the_rate_is_the_peak_times_the_factor_however_often_it_is_set():
    parameters = {"a": nn.Parameter(torch.zeros(3))}
    optimizer = make_optimizer(Training(learning_rate=2e-4), parameters)

    rates = [set_learning_rate(optimizer, factor) for factor in (0.5, 0.25, 1.0)]

    assert rates == [1e-4, 5e-5, 2e-4]
    assert optimizer.param_groups[0]["lr"] == 2e-4


NAMES = ("layers.0.q_proj.lora_A", "layers.0.q_proj.lora_B", "layers.0.q_proj.magnitude", "head.trained.bias")


def groups_of(**settings) -> list[dict]:
    parameters = {name: nn.Parameter(torch.ones(2)) for name in NAMES}
    optimizer = make_optimizer(Training(learning_rate=1e-3, **settings), parameters)
    set_learning_rate(optimizer, 0.5)
    names = {id(parameter): name for name, parameter in parameters.items()}
    return [
        {
            "names": [names[id(p)] for p in group["params"]],
            "lr": pytest.approx(group["lr"]),
            "decay": group["weight_decay"],
        }
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loraplus_lets_B_learn_faster_by_the_ratio_and_nothing_else(name):
    """Hayou et al. 2024, section 4: two rates, one for A and one for B, in a fixed ratio all through the schedule."""
    assert groups_of(optimizer=name, loraplus_lr_ratio=16) == [
        {"names": [NAMES[0], NAMES[2], NAMES[3]], "lr": 5e-4, "decay": 0.0},
        {"names": [NAMES[1]], "lr": 8e-3, "decay": 0.0},
    ]


def test_biases_do_not_decay():
    assert groups_of(weight_decay=0.1) == [
        {"names": [NAMES[3]], "lr": 5e-4, "decay": 0.0},
        {"names": list(NAMES[:3]), "lr": 5e-4, "decay": 0.1},
    ]


def test_without_either_there_is_one_group():
    assert groups_of() == [{"names": list(NAMES), "lr": 5e-4, "decay": 0.0}]


def problem(seed: int = 0):
    """Parameters, one of them large enough for 8-bit state, and their gradient at every step."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "layers.0.q_proj.lora_A": nn.Parameter(torch.randn(64, 128, generator=generator)),
        "layers.0.q_proj.lora_B": nn.Parameter(torch.randn(5, 3, generator=generator)),
        "m": nn.Parameter(torch.randn(7, generator=generator)),
    }


def steps(optimizer, parameters, numbers) -> None:
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        set_learning_rate(optimizer, 1 / number)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("ratio", [1, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_saved_and_restored_continues_bit_for_bit(name, ratio):
    settings = Training(optimizer=name, learning_rate=0.01, weight_decay=0.1, loraplus_lr_ratio=ratio)
    straight = problem()
    steps(make_optimizer(settings, straight), straight, range(1, 7))

    first = problem()
    optimizer = make_optimizer(settings, first)
    steps(optimizer, first, range(1, 4))
    tensors, scalars = optimizer_state(optimizer, first)
    again = {key: nn.Parameter(value.detach().clone()) for key, value in first.items()}
    resumed = make_optimizer(settings, again)
    restore_optimizer(resumed, again, tensors, scalars)
    steps(resumed, again, range(4, 7))

    assert tensors
    assert all(torch.equal(again[key], straight[key]) for key in straight)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_its_state_an_optimizer_would_go_elsewhere(name):
    """The law above could not fail otherwise."""
    settings = Training(optimizer=name, learning_rate=0.01)
    straight, broken = problem(), problem()
    steps(make_optimizer(settings, straight), straight, range(1, 5))
    steps(make_optimizer(settings, broken), broken, range(1, 3))

    steps(make_optimizer(settings, broken), broken, range(3, 5))

    assert not any(torch.equal(broken[key], straight[key]) for key in straight)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "8bit" in name])
def test_eight_bit_optimizers_keep_large_states_in_eight_bits(name):
    parameters = problem()
    optimizer = make_optimizer(Training(optimizer=name), parameters)
    steps(optimizer, parameters, [1])

    tensors, _ = optimizer_state(optimizer, parameters)

    assert tensors["layers.0.q_proj.lora_A/state1"].dtype == torch.uint8
    assert tensors["layers.0.q_proj.lora_B/state1"].dtype == torch.float32


def test_the_state_is_a_copy():
    parameters = problem()
    optimizer = make_optimizer(Training(), parameters)
    steps(optimizer, parameters, [1])

    tensors, _ = optimizer_state(optimizer, parameters)
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    steps(optimizer, parameters, [2])

    assert all(torch.equal(before[key], tensors[key]) for key in before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_adamw(name):
    """One step against the formula of Loshchilov and Hutter; 8-bit state is not yet rounded at the first step."""
    parameters = {"a": nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))}
    before, gradient = parameters["a"].detach().clone(), torch.tensor([0.3, -0.1, 2.0])
    optimizer = make_optimizer(Training(optimizer=name, learning_rate=0.1, weight_decay=0.01), parameters)

    parameters["a"].grad = gradient.clone()
    optimizer.step()

    expected = before * (1 - 0.1 * 0.01) - 0.1 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(parameters["a"].detach(), expected, atol=1e-6, rtol=1e-5)
