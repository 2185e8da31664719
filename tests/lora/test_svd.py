"""The decomposition of an update: what truncation cuts off is the least that any update of that rank must miss."""

import pytest
import torch

from lora_cli.lora.adapter import Factors
from lora_cli.lora.inject import generator_for
from lora_cli.lora.svd import EXACT_WIDTH, distance, of_dense, of_dense_by_energy, of_factors

SHAPES = [(96, 64, 8), (24, 80, 8), (6, 50, 8), (50, 6, 8)]  # out, in, r: also ranks above the width


def factors_of(out: int, width: int, r: int) -> Factors:
    generator = torch.Generator().manual_seed(out)
    return Factors(torch.randn(r, width, generator=generator), torch.randn(out, r, generator=generator))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("r", [1, 3, 6])
def test_truncation_is_the_optimum_of_eckart_and_young(shape, r):
    factors = factors_of(*shape)
    update = -0.7 * factors.B.double() @ factors.A.double()
    S = torch.linalg.svdvals(update)

    found = of_factors(factors, -0.7)
    cut = found.factors(r)

    missed = torch.linalg.norm(update - cut.B.double() @ cut.A.double())
    assert missed == pytest.approx(S[r:].norm().item(), rel=1e-5, abs=1e-5)
    assert found.error(r) == pytest.approx((S[r:].norm() / S.norm()).item(), abs=1e-6)
    assert found.norm == pytest.approx(S.norm().item())


@pytest.mark.parametrize("shape", SHAPES)
def test_all_terms_are_the_update_itself(shape):
    factors = factors_of(*shape)
    found = of_factors(factors, 2.0)

    whole = found.factors(shape[2])

    assert whole.A.shape[0] == shape[2]
    torch.testing.assert_close(whole.B @ whole.A, 2 * factors.B @ factors.A, rtol=1e-4, atol=1e-5)
    assert found.error(shape[2]) < 1e-7


def spectrum(width: int) -> torch.Tensor:
    """[width, width + 32] with singular values 1, 1/2, 1/3 …"""
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(width + 32, width, generator=generator)).Q
    return U / torch.arange(1, width + 1) @ V.T


def test_a_wide_matrix_is_cut_by_random_projection_as_well_as_exactly():
    M = spectrum(EXACT_WIDTH + 32)
    S = torch.linalg.svdvals(M.double())

    found = of_dense(M, 8, generator_for(0, "x"))

    assert len(found.S) == 8
    assert found.is_partial
    best = (S[8:].norm() / S.norm()).item()
    assert found.error(8) == pytest.approx(best, rel=1e-4)
    assert distance(M, found.factors(8)) / found.norm == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("width", [100, EXACT_WIDTH + 32])
def test_the_rank_of_an_energy_is_the_fewest_terms_that_hold_it(width):
    M = spectrum(width)
    held = torch.linalg.svdvals(M.double()).square().cumsum(0)
    fewest = 1 + int((held < 0.97 * held[-1]).sum())

    found = of_dense_by_energy(M, 0.97, generator_for(0, "x"))

    assert found.rank_of_energy(0.97) == fewest
    assert found.error(fewest) <= (1 - 0.97) ** 0.5 < found.error(fewest - 1)


def test_a_zero_update_has_one_term_and_no_error():
    found = of_factors(Factors(torch.ones(2, 5), torch.zeros(4, 2)), 1.0)

    assert found.error(1) == 0
    assert found.rank_of_energy(0.9) == 1
