"""Checkpointing changes what is kept, and nothing that is computed."""

import pytest
import torch
from budget.steps import tiny_step
from tiny import CONFIGS

from lora_cli.errors import ModelError
from lora_cli.lora.inject import lora_layers
from lora_cli.models.recompute import described, is_recomputed, recompute_of, setting_of


def trained(name: str, recompute, **options) -> tuple[torch.Tensor, list[torch.Tensor]]:
    step = tiny_step(name, recompute=recompute, **options)
    for layer in lora_layers(step.model).values():
        layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)
    loss = step.loss()
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in step.trained]


@pytest.mark.parametrize("recompute", [1, 2, "mlp"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_are_those_without_checkpointing(name, packed, recompute):
    if (name, recompute) == ("opt", "mlp"):
        pytest.skip("its blocks have no module for the MLP")
    loss, gradients = trained(name, 0, packed=packed)

    again, recomputed = trained(name, recompute, packed=packed)

    assert torch.equal(loss, again)
    assert all(map(torch.equal, gradients, recomputed))


@pytest.mark.parametrize("recompute", [1, "mlp"])
def test_dropout_drops_the_same_again(recompute):
    loss, gradients = trained("llama", 0, dropout=0.2)

    again, recomputed = trained("llama", recompute, dropout=0.2)

    assert torch.equal(loss, again)
    assert all(map(torch.equal, gradients, recomputed))


@pytest.mark.parametrize("recompute", [1, "mlp"])
def test_names_and_modules_stay_what_they_are(recompute):
    plain, checkpointed = (tiny_step("llama", recompute=mode).model for mode in (0, recompute))

    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in checkpointed.named_parameters()]
    for before, after in zip(plain.modules(), checkpointed.modules(), strict=True):
        assert isinstance(after, type(before))


def test_an_evaluation_computes_nothing_twice():
    step = tiny_step("llama", recompute=1)
    calls = []
    step.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))

    step.loss().backward()
    in_training = len(calls)
    step.model.eval()
    step.loss().backward()

    assert in_training == 2
    assert len(calls) == 3


def test_blocks_without_an_mlp_are_named():
    with pytest.raises(ModelError) as caught:
        tiny_step("opt", recompute="mlp")

    assert str(caught.value) == (
        "error: `training.gradient_checkpointing: mlp` needs blocks with an MLP, and OPTDecoderLayer has none\n"
        "  fix: set `training.gradient_checkpointing: true`, or 2 for every second block"
    )


def test_a_number_is_every_kth_block_from_the_first():
    assert [[i for i in range(5) if is_recomputed(i, k)] for k in (0, 1, 2, 3)] == [
        [],
        [0, 1, 2, 3, 4],
        [0, 2, 4],
        [0, 3],
    ]


@pytest.mark.parametrize(
    ("setting", "recompute", "words"),
    [(True, 1, "every block"), (False, 0, "none"), ("mlp", "mlp", "MLPs"), (3, 3, "every 3rd block")],
)
def test_a_recipes_setting_has_one_meaning(setting, recompute, words):
    assert recompute_of(setting) == recompute
    assert setting_of(recompute) == setting
    assert described(recompute) == words
