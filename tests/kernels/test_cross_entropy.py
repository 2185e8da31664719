"""The loss without all logits at once is torch's loss on all of them."""

import pytest
import torch
import torch.nn.functional as F

from lora_cli.kernels import cross_entropy
from lora_cli.kernels.cross_entropy import Head, head_cross_entropy

VOCABULARY, HIDDEN, ROWS = 50, 8, 13


def given(dtype=torch.float64, **head):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype)
    labels = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    weights = torch.rand(ROWS, generator=generator)
    weights[3] = 0.0
    return hidden, Head(weight, **head), labels, weights


def plain(hidden, head, labels, weights):
    logits = head.scale * F.linear(hidden, head.weight, head.bias)
    logits = logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    return losses * weights


HEADS = {
    "plain": {},
    "bias": {"bias": torch.linspace(-1, 1, VOCABULARY, dtype=torch.float64)},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 2.0},
    "all": {"bias": torch.linspace(-1, 1, VOCABULARY, dtype=torch.float64), "scale": 3.0, "softcap": 2.0},
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("rows_at_once", [1, 5, 100])
def test_loss_and_gradient_are_those_of_all_logits_at_once(head, rows_at_once, monkeypatch):
    monkeypatch.setitem(cross_entropy.LOGITS_AT_ONCE, "cpu", rows_at_once * VOCABULARY)
    hidden, *rest = given(**HEADS[head])

    losses, expected = head_cross_entropy(hidden, *rest), plain(hidden, *rest)

    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    over = torch.linspace(1, 3, ROWS)
    gradients = [torch.autograd.grad(each @ over, hidden)[0] for each in (losses, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


def test_in_bfloat16_it_is_as_near_to_the_truth_as_torch():
    hidden, head, labels, weights = given(torch.bfloat16)
    truth = plain(hidden.double(), Head(head.weight.double()), labels, weights).sum()

    ours, torchs = (abs(f(hidden, head, labels, weights).sum() - truth) for f in (head_cross_entropy, plain))

    assert ours <= torchs + 1e-2


def test_a_row_of_no_weight_has_no_gradient_and_no_rows_are_no_loss():
    hidden, head, labels, weights = given()

    [gradient] = torch.autograd.grad(head_cross_entropy(hidden, head, labels, weights).sum(), hidden)
    losses = head_cross_entropy(hidden[:0], head, labels[:0], weights[:0])
    losses.sum().backward()

    assert not gradient[3].any()
    assert gradient[4].any()
    assert losses.shape == (0,)


def test_what_is_kept_is_the_size_of_the_hidden_states_and_nothing_in_evaluation():
    hidden, *rest = given()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        head_cross_entropy(hidden, *rest)
    with torch.no_grad():
        evaluated = head_cross_entropy(hidden, *rest)

    assert [tuple(tensor.shape) for tensor in saved] == [(ROWS, HIDDEN)]
    assert not evaluated.requires_grad
