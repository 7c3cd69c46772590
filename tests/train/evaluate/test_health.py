import pytest
import torch

from tests.train.evaluate.test_knn import CPU, clusters
from train.evaluate.features import Features
from train.evaluate.health import Health


def of(h: torch.Tensor) -> dict[str, float]:
    features = Features(h, torch.arange(len(h)), torch.full((len(h),), -1))
    return dict(Health()(features, features, CPU))


def test_the_spectrum_is_that_of_singular_values() -> None:
    h = clusters(200, 0).h + 3
    values = torch.linalg.svdvals(h.double())
    shares = values / values.sum()
    found = of(h)
    assert found["dimensions"] == 12
    assert found["RankMe"] == pytest.approx((-(shares * shares.log()).sum()).exp().item(), rel=1e-6)
    variances = torch.linalg.svdvals((h - h.mean(0)).double()).square()
    expected = 100 * (variances[0] / variances.sum()).item()
    assert found["variance of the first direction %"] == pytest.approx(expected, rel=1e-4)


def test_even_spectra_use_all_dimensions_and_falling_ones_few() -> None:
    q, _ = torch.linalg.qr(torch.randn(200, 16, generator=torch.Generator().manual_seed(0)))
    q = q - q.mean(0)
    even, falling = of(q), of(q * torch.arange(1.0, 17.0) ** -1.0)
    assert even["RankMe"] == pytest.approx(16, rel=0.01)
    assert falling["RankMe"] < 11
    assert even["alpha-ReQ"] == pytest.approx(0, abs=0.1)
    assert falling["alpha-ReQ"] == pytest.approx(2, rel=0.1), "eigenvalues are squares"
