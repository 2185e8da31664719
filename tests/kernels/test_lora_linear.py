import pytest
import torch

from lora_cli.kernels import products
from lora_cli.kernels.lora_linear import lora_linear, lora_update


def factors(r: int, *, dtype=torch.float32):
    generator = torch.Generator().manual_seed(r)
    return (torch.randn(r, 6, generator=generator).to(dtype), torch.randn(5, r, generator=generator).to(dtype))


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6), (0, 6)])
@pytest.mark.parametrize("r", [1, 3, 8])
def test_the_update_is_scale_times_x_A_B_for_any_leading_shape(shape, r):
    x, (A, B) = torch.randn(shape), factors(r)

    torch.testing.assert_close(lora_update(x, A, B, 0.75), 0.75 * (x @ A.T @ B.T))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_it_is_computed_in_the_type_of_x_and_the_gradients_arrive_in_that_of_the_factors(dtype):
    x, (A, B) = torch.randn(3, 6).to(dtype), factors(2)
    A.requires_grad_(), B.requires_grad_()

    y = lora_update(x, A, B, 2.0)
    y.sum().backward()

    assert y.dtype == dtype
    assert A.grad.dtype == B.grad.dtype == torch.float32


def test_its_gradients_are_those_of_finite_differences():
    A, B = factors(3, dtype=torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64)

    assert torch.autograd.gradcheck(
        lambda *given: lora_update(*given, 1.5), [t.requires_grad_() for t in (x, A, B)], atol=1e-8
    )


def plain(x, W, bias, A, B, scale, *, dropped=None):
    """What the function must agree with, as autograd composes it."""
    return torch.nn.functional.linear(x, W, bias) + lora_update(x if dropped is None else dropped, A, B, scale)


def layer(dtype=torch.float64, *, bias=True, rows=(4, 3)):
    """x, W, bias, A, B of which all but W take a gradient."""
    generator = torch.Generator().manual_seed(0)
    x, W, b, A, B = (torch.randn(*shape, generator=generator) for shape in ((*rows, 6), (5, 6), (5,), (3, 6), (5, 3)))
    frozen = (W.to(dtype), b.to(dtype) if bias else None)
    master = torch.float64 if dtype == torch.float64 else torch.float32
    return (x.to(dtype).requires_grad_(), *frozen, A.to(master).requires_grad_(), B.to(master).requires_grad_())


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_gradients_of_the_layer_are_those_of_finite_differences(bias):
    x, W, b, A, B = layer(bias=bias)

    assert torch.autograd.gradcheck(lambda x, A, B: lora_linear(x, W, b, A, B, 0.75), [x, A, B])


def test_behind_a_dropout_x_and_what_is_left_of_it_have_gradients_of_their_own():
    x, W, b, A, B = layer()
    dropped = (x * 2 * (torch.arange(6) % 2)).detach().requires_grad_()

    assert torch.autograd.gradcheck(
        lambda x, dropped, A, B: lora_linear(x, W, b, A, B, 0.75, dropped=dropped), [x, dropped, A, B]
    )


@pytest.mark.parametrize("rows", [(), (4,), (2, 3), (0,), (24,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_layer_is_its_composition_whatever_the_rows_and_the_type(dtype, rows):
    given = layer(dtype, rows=rows)
    dy = torch.randn(*rows, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    trained = [tensor for tensor in given if tensor is not None and tensor.requires_grad]

    found, expected = lora_linear(*given, 0.75), plain(*given, 0.75)

    rounding = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-1}
    torch.testing.assert_close(found, expected, **rounding)
    pairs = zip(*(torch.autograd.grad(y, trained, dy) for y in (found, expected)), strict=True)
    for gradient, of_plain in pairs:
        assert gradient.dtype == of_plain.dtype
        torch.testing.assert_close(gradient, of_plain, **rounding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_where_narrow_products_are_emulated_ours_are_nearer_to_the_truth(dtype, monkeypatch):
    monkeypatch.setattr(products, "_cpu_has_bfloat16", lambda: False)
    given = layer(dtype, rows=(64,))
    truth = plain(*(tensor.double() for tensor in given), 0.75)

    ours, composed = (f(*given, 0.75).double() - truth for f in (lora_linear, plain))

    assert ours.norm() < composed.norm()


def saved_by(function) -> list[torch.Tensor]:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        function()
    return saved


def test_of_the_activations_x_alone_is_kept_and_its_narrow_product():
    x, W, b, A, B = layer(torch.bfloat16)
    own = [tensor.data_ptr() for tensor in (W, A, B)]

    kept = [tensor for tensor in saved_by(lambda: lora_linear(x, W, b, A, B, 1.0)) if tensor.data_ptr() not in own]

    assert [tuple(tensor.shape) for tensor in kept] == [(4, 3, 6), (12, 3)]
    assert kept[0].data_ptr() == x.data_ptr()


def test_with_a_frozen_A_x_is_not_kept_either():
    x, W, b, A, B = layer()
    own = [tensor.data_ptr() for tensor in (W, A, B)]

    kept = saved_by(lambda: lora_linear(x, W, b, A.detach(), B, 1.0))

    assert [tuple(tensor.shape) for tensor in kept if tensor.data_ptr() not in own] == [(12, 3)]


def test_without_an_update_the_output_is_the_base_bit_for_bit():
    x, W, b, A, B = layer(torch.float32)

    assert torch.equal(lora_linear(x, W, b, A, torch.zeros_like(B), 2.0), torch.nn.functional.linear(x, W, b))
