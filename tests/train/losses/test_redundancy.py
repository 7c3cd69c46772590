"""Losses of redundancy against the papers' algorithms, and against one another."""

import math

import pytest
import torch

from tests.train.methods.steps import embeddings
from train.losses.redundancy import barlow_twins, covariance, cross_correlation, variance_hinge


def whitened(z: torch.Tensor) -> torch.Tensor:
    """Mean 0 and covariance (biased) the identity."""
    centred = z - z.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(z))
    return centred @ vectors @ torch.diag(values.rsqrt()) @ vectors.T


def barlow_transcribed(a: torch.Tensor, b: torch.Tensor, weight: float) -> float:
    """Equations 1 and 2 of the paper, element by element; BatchNorm's epsilon is the authors' code's."""
    n, d = a.shape
    total = 0.0
    for i in range(d):
        for j in range(d):
            x, y = [float(v) for v in a[:, i]], [float(v) for v in b[:, j]]
            mx, my = sum(x) / n, sum(y) / n
            vx, vy = sum((v - mx) ** 2 for v in x) / n, sum((v - my) ** 2 for v in y) / n
            products = sum((u - mx) * (v - my) for u, v in zip(x, y, strict=True)) / n
            c = products / math.sqrt((vx + 1e-5) * (vy + 1e-5))
            total += (1 - c) ** 2 if i == j else weight * c**2
    return total


def test_barlow_twins_is_the_papers() -> None:
    a, b = embeddings(7, 5), embeddings(7, 5, seed=1)
    assert barlow_twins(a, b, 0.3).item() == pytest.approx(barlow_transcribed(a, b, 0.3), rel=1e-12)


def test_gradients_of_both_are_those_of_finite_differences() -> None:
    a, b = embeddings(6, 4).requires_grad_(), embeddings(6, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: barlow_twins(x, y, 0.3), (a, b))
    assert torch.autograd.gradcheck(lambda x: covariance(x) + variance_hinge(0.3 * x), (a,))


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_shares_of_the_rows_add_up(processes: int) -> None:
    a, b = embeddings(7, 5), embeddings(7, 5, seed=1)
    shares = [slice(rank, None, processes) for rank in range(processes)]
    torch.testing.assert_close(sum(barlow_twins(a, b, 0.3, rows) for rows in shares), barlow_twins(a, b, 0.3))
    torch.testing.assert_close(sum(covariance(a, rows) for rows in shares), covariance(a))


def test_barlow_twins_does_not_see_the_scale_of_a_dimension_or_the_order_of_images() -> None:
    a, b, order = embeddings(50, 5), embeddings(50, 5, seed=1), torch.randperm(50)
    scale = torch.tensor([1e3, 2e3, 5e3, 1e4, 3e3], dtype=torch.float64)
    expected = barlow_twins(1e3 * a, 1e3 * b, 0.3)
    torch.testing.assert_close(barlow_twins(scale * a, 1e3 * b + 7, 0.3), expected)
    torch.testing.assert_close(barlow_twins(1e3 * a[order], 1e3 * b[order], 0.3), expected)


def test_barlow_twins_is_zero_for_equal_white_views_and_counts_dimensions_at_collapse() -> None:
    z = whitened(embeddings(50, 5))
    assert barlow_twins(z, z, 0.3).item() < 1e-8
    collapsed = torch.ones(50, 5, dtype=torch.float64)
    assert barlow_twins(collapsed, collapsed, 0.3).item() == pytest.approx(5)
    repeated = z[:, :1].expand(50, 5)
    assert barlow_twins(repeated, repeated, 0.3).item() == pytest.approx(0.3 * 5 * 4, rel=1e-4)


def vicreg_transcribed(z: torch.Tensor) -> tuple[float, float]:
    """v and c of the paper (equations 1 to 4), element by element."""
    n, d = z.shape
    mean = z.mean(0)
    c = sum(torch.outer(row - mean, row - mean) for row in z) / (n - 1)
    assert isinstance(c, torch.Tensor)
    v = sum(max(0.0, 1 - math.sqrt(float(c[j, j]) + 1e-4)) for j in range(d)) / d
    return v, sum(float(c[i, j]) ** 2 for i in range(d) for j in range(d) if i != j) / d


@pytest.mark.parametrize("scale", [0.4, 1.0])
def test_variance_and_covariance_are_the_papers(scale: float) -> None:
    z = scale * embeddings(7, 5)
    v, c = vicreg_transcribed(z)
    assert variance_hinge(z).item() == pytest.approx(v, rel=1e-12)
    assert covariance(z).item() == pytest.approx(c, rel=1e-12)


def test_on_standardized_dimensions_covariance_is_barlows_redundancy_of_a_view_with_itself() -> None:
    """Claim: with unit variances, VICReg's covariance term is Barlow's off-diagonal term / D, but for n - 1 and eps."""
    z = embeddings(40, 6)
    z = 1e3 * (z - z.mean(0)) / z.std(dim=0)
    redundancy = barlow_twins(z, z, 1.0) - barlow_twins(z, z, 0.0)
    torch.testing.assert_close(covariance(z / 1e3), redundancy / 6, rtol=1e-8, atol=0)


def test_on_white_views_invariance_is_barlows_diagonal() -> None:
    """Claim: for whitened views ``mean |a - b|^2 = 2 mean_i (1 - C_ii)``, and VICReg's other terms vanish."""
    a, b = whitened(embeddings(60, 4)), whitened(embeddings(60, 4, seed=1) + 2 * embeddings(60, 4))
    diagonal = cross_correlation(a, b, eps=0.0).diagonal()
    torch.testing.assert_close((a - b).square().mean(), 2 * (1 - diagonal).mean())
    assert variance_hinge(a).item() == 0
    assert covariance(a).item() < 1e-20


def test_variance_pushes_a_collapsed_batch_apart() -> None:
    """At full collapse no direction is known, and the gradient is 0 but finite; next to it, it spreads."""
    collapsed = torch.ones(8, 3, dtype=torch.float64, requires_grad=True)
    value = variance_hinge(collapsed)
    value.backward()
    assert value.item() == pytest.approx(1 - 1e-2)
    assert collapsed.grad is not None
    assert collapsed.grad.abs().max() == 0
    z = (torch.ones(8, 3, dtype=torch.float64) + 0.01 * embeddings(8, 3)).requires_grad_()
    variance_hinge(z).backward()
    assert z.grad is not None
    assert ((z - z.grad).std(dim=0) > z.std(dim=0)).all()
