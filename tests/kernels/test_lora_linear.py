import pytest
import torch

from lora_cli.kernels.lora_linear import lora_update


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
