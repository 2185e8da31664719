"""A module of several runs gives each run's rows what the run's own module gives them."""

from copy import deepcopy

import pytest
import torch
from layers import IN, MAKERS, PATH, config_of, frozen, inputs, randomize, relative_difference

from lora_cli.errors import ModelError
from lora_cli.lora.inject import inject, remove
from lora_cli.lora.joint import Group, Groups, Stream, join


def run(storage: str, seed: int, **settings):
    model = frozen(storage)
    inject(model, config_of("plain", **settings), [PATH])
    randomize(model, seed=seed)
    return model.train()


def joined(models) -> tuple[torch.nn.Module, Groups]:
    base = deepcopy(models[0])
    remove(base)
    groups = join(base, models)
    return base.train(), groups


@pytest.mark.parametrize("storage", MAKERS)
def test_rows_pass_through_the_layers_of_their_own_run(storage):
    models = [run(storage, seed=1, r=2), run(storage, seed=2), frozen(storage).requires_grad_(False).train()]
    joint, groups = joined(models)
    x = inputs(storage).repeat(3, *(1,) * (inputs(storage).ndim - 1))
    groups.now = [Group(number, len(x) // 3, 0, Stream(0)) for number in range(3)]

    found = joint(x).split(len(x) // 3)

    for got, own, rows in zip(found, models, x.split(len(x) // 3), strict=True):
        assert relative_difference(got, own(rows)) <= 1e-6


def test_dropout_of_tokens_in_one_row_is_that_of_the_run_by_itself():
    """As a router sees them: the tokens of all rows one behind the other; the second run's rows are shorter."""
    models = [run("Linear", seed=seed, lora_dropout=0.3) for seed in (1, 2)]
    joint, groups = joined(models)
    x = torch.randn(3, 5, IN)
    groups.time = 5
    groups.now = [Group(0, 1, 5, Stream(7)), Group(1, 2, 4, Stream(8))]

    found = joint(x.flatten(0, 1)).unflatten(0, (3, 5))

    torch.manual_seed(8)
    assert relative_difference(found[1:, :4], models[1](x[1:, :4].flatten(0, 1)).unflatten(0, (2, 4))) <= 1e-6
    torch.manual_seed(7)
    assert relative_difference(found[:1], models[0](x[0]).unsqueeze(0)) <= 1e-6


@pytest.mark.parametrize("shape", [(1, 5, IN), (8, IN), (8, 5, IN)])
def test_what_belongs_to_no_run_is_refused(shape):
    """As DeBERTa's table of distances, of which a batch has one; also where the runs' rows would divide it."""
    models = [run("Linear", seed=seed) for seed in (1, 2)]
    joint, groups = joined(models)
    groups.time = 5
    groups.now = [Group(number, 2, 5, Stream(0)) for number in range(2)]

    with pytest.raises(ModelError, match="can't be told apart"):
        joint(torch.randn(shape))
