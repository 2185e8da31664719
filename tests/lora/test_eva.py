"""EVA's parts: principal directions batch by batch, and ranks by what they explain (Paischer et al. 2024)."""

import pytest
import torch
from torch import nn

from lora_cli.lora.eva import Principal, principal_directions, ranks_by_variance


def vectors(count: int = 600, width: int = 24, seed: int = 0) -> torch.Tensor:
    """With a mean, and variances that fall fast."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    return torch.randn(count, width, generator=generator) * 0.6 ** torch.arange(width) @ rotation + 3


def principal(most: int, *batches: torch.Tensor) -> Principal:
    found = Principal(most)
    for batch in batches:
        found.add(batch)
    return found


def exact(X: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions and shares of variance by the plain formula: the eigenvectors of the covariance."""
    variances, vectors = torch.linalg.eigh(torch.cov(X.double().T))
    return vectors.flip(1).T[:k].float(), (variances.flip(0)[:k] / variances.sum()).float()


@pytest.mark.parametrize("sizes", [[600], [100] * 6, [3, 97, 250, 1, 249]])
def test_in_batches_of_any_size_it_is_the_decomposition_of_all(sizes):
    X = vectors()
    directions, shares = exact(X, 24)

    found = principal(24, *X.split(sizes))

    torch.testing.assert_close(found.explained[:12], shares[:12], rtol=1e-3, atol=1e-6)
    cosines = (found.directions * directions).sum(dim=1).abs()
    assert cosines[:8].min() > 0.999


def test_cut_to_a_few_directions_it_still_finds_the_strongest():
    X = vectors()
    directions, shares = exact(X, 3)

    found = principal(8, *X.split(50))

    torch.testing.assert_close(found.explained[:3], shares, rtol=0.02, atol=0)
    assert (found.directions[:3] * directions).sum(dim=1).abs().min() > 0.99
    assert found.directions.shape == (8, 24)


def test_it_has_converged_once_a_batch_turns_nothing():
    X = vectors()

    assert not principal(3, X[:20], vectors(seed=5)[:20]).converged
    assert principal(3, X, X[:50]).converged


class Two(nn.Module):
    """Two layers that read the same input, and one that reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.d = nn.Linear(24, 4), nn.Linear(24, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.d(self.q(x) + self.k(x))


def test_modules_with_one_input_share_what_is_found_and_it_ends_where_nothing_turns():
    model, calls = Two(), []

    def batches():
        for part in (vectors()[:300], *[vectors()[:300]] * 20):
            calls.append(part)
            yield lambda part=part: model(part)

    found = principal_directions(model, ["q", "k", "d"], batches(), most=2)

    assert found["q"] is found["k"]
    assert found["q"] is not found["d"]
    assert len(calls) == 2  # the same rows again
    torch.testing.assert_close(found["q"].explained, principal(2, vectors()[:300], vectors()[:300]).explained)
    assert not any(module._forward_pre_hooks for module in model.modules())


class Shares:
    def __init__(self, *shares: float) -> None:
        self.explained = torch.tensor(shares)


def test_ranks_go_where_variance_is_explained_and_their_sum_stays():
    """Section 3.3: the N · r largest shares of all modules, up to ρ · r a module."""
    found = {"a": Shares(0.5, 0.3, 0.1, 0.05), "b": Shares(0.2, 0.15, 0.04, 0.03), "c": Shares(0.02, 0.01, 0.0, 0.0)}

    assert ranks_by_variance(found, 2, 2.0) == {"a": 4, "b": 2, "c": 0}
    assert ranks_by_variance(found, 2, 1.5) == {"a": 3, "b": 3, "c": 0}
    assert ranks_by_variance(found, 2, 1.0) == {"a": 2, "b": 2, "c": 2}
