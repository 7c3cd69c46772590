"""Losses of distribution: the papers' algorithms, values that theory gives, and what each can and cannot see."""

import math
from itertools import product

import pytest
import torch

from train.losses.distribution import centre, characteristic, scale, shape, sigreg, unit_slices
from train.losses.redundancy import covariance, variance_hinge

T = [3 * k / 16 for k in range(17)]
WEIGHTS = [(3 / 16) * (1 if k in (0, 16) else 2) * math.exp(-(t**2) / 2) for k, t in enumerate(T)]


def normal(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def statistic(z: torch.Tensor, slices: torch.Tensor) -> torch.Tensor:
    return sigreg(characteristic(z, slices), z.shape[-2])


def transcribed(z: torch.Tensor, slices: torch.Tensor) -> float:
    """SIGReg of one view (N, D) along slices (D, K), sum by sum."""
    n, total = len(z), 0.0
    for direction in slices.T:
        x = [float(row @ direction) for row in z]
        for t, weight in zip(T, WEIGHTS, strict=True):
            cosine, sine = sum(math.cos(t * v) for v in x) / n, sum(math.sin(t * v) for v in x) / n
            total += weight * ((cosine - math.exp(-(t**2) / 2)) ** 2 + sine**2)
    return n * total / slices.shape[1]


def test_sigreg_is_the_papers_and_averages_over_views() -> None:
    z, slices = normal(2, 7, 5), unit_slices(normal(5, 3, seed=1))
    expected = (transcribed(z[0], slices) + transcribed(z[1], slices)) / 2
    assert statistic(z, slices).item() == pytest.approx(expected, rel=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    z, slices = normal(2, 6, 4).requires_grad_(), unit_slices(normal(4, 3, seed=1))
    assert torch.autograd.gradcheck(lambda x: statistic(x, slices) + centre(x) + scale(x), (z,))


def test_characteristic_functions_of_equal_parts_average_to_the_whole() -> None:
    z, slices = normal(6, 5), unit_slices(normal(5, 3, seed=1))
    parts = torch.stack([characteristic(part, slices) for part in z.split(2)])
    torch.testing.assert_close(parts.mean(0), characteristic(z, slices))


@pytest.mark.parametrize("num_images", [16, 64])
def test_sigreg_of_a_gaussian_is_a_constant_in_expectation(num_images: int) -> None:
    """``sum_t w (1 - exp(-t^2))`` for N(0, I), whatever N: 4000 batches, to 4 standard errors."""
    expected = sum(w * (1 - math.exp(-(t**2))) for t, w in zip(T, WEIGHTS, strict=True))
    views = normal(4000, num_images, 2)
    slices = unit_slices(normal(2, 1, seed=1))
    values = torch.stack([statistic(batch, slices) for batch in views])
    assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(len(views))


def error(characteristic_function: list[float]) -> float:
    """SIGReg / N of a symmetric distribution in the limit of many images."""
    pairs = zip(T, WEIGHTS, characteristic_function, strict=True)
    return sum(w * (value - math.exp(-(t**2) / 2)) ** 2 for t, w, value in pairs)


@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.0, 2.0])
def test_sigreg_grows_with_the_batch_for_any_other_variance(sigma: float) -> None:
    quantiles = torch.special.ndtri((torch.arange(20000, dtype=torch.float64) + 0.5) / 20000)[:, None]
    found = statistic(sigma * quantiles, torch.ones(1, 1, dtype=torch.float64)) / 20000
    expected = error([math.exp(-((sigma * t) ** 2) / 2) for t in T])
    assert found.item() == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert (expected > 1e-3) == (sigma != 1.0)


def test_sigreg_and_shape_see_what_covariances_do_not() -> None:
    """Claim: the corners of a cube are white, so VICReg's terms vanish there; they are not Gaussian."""
    corners = torch.tensor(list(product([-1.0, 1.0], repeat=3)), dtype=torch.float64)
    axes = torch.eye(3, dtype=torch.float64)
    assert variance_hinge(corners).item() == 0
    assert covariance(corners).item() == 0
    assert scale(corners[None]).item() == centre(corners[None]).item() == 0
    assert statistic(corners, axes).item() == pytest.approx(8 * error([math.cos(t) for t in T]), rel=1e-12)
    assert statistic(corners, axes).item() / 8 > 0.05
    assert (shape(corners[None], axes) > 0.1).all()


def test_sigreg_has_no_gradient_at_collapse_and_scale_has() -> None:
    """Claim (Wu et al., 2026, figure 2): near z = 0 SIGReg's gradient vanishes with z, and (1 - std)^2's does not."""
    slices = unit_slices(normal(4, 64, seed=1))
    norms: dict[str, list[float]] = {"sigreg": [], "scale": []}
    for size in (1e-2, 1e-4):
        z = (size * normal(1, 32, 4)).requires_grad_()
        norms["sigreg"].append(float(torch.autograd.grad(statistic(z, slices), z)[0].norm()))
        norms["scale"].append(float(torch.autograd.grad(scale(z), z)[0].norm()))
    assert norms["sigreg"][1] < 0.02 * norms["sigreg"][0]
    assert norms["scale"][1] == pytest.approx(norms["scale"][0], rel=0.05)


def test_scale_is_finite_where_all_images_are_equal() -> None:
    z = torch.ones(1, 6, 4, dtype=torch.float64, requires_grad=True)
    value = scale(z) + centre(z) + shape(z, torch.eye(4, dtype=torch.float64)).mean()
    (gradient,) = torch.autograd.grad(value, z)
    assert scale(z).item() == 1
    assert gradient.isfinite().all()


def shape_transcribed(z: torch.Tensor, slices: torch.Tensor) -> float:
    """Equations 2 to 5 of VISReg for one view (N, D)."""
    n = len(z)
    normalised = (z - z.mean(0)) / (z.std(dim=0, correction=0) + 1e-4)
    total = 0.0
    for direction in slices.T:
        along = sorted(float(row @ direction) for row in normalised)
        for i, value in enumerate(along, start=1):
            quantile = float(torch.special.ndtri(torch.tensor(i / (n + 1), dtype=torch.float64)))
            total += (value - quantile) ** 2 / n
    return total / slices.shape[1]


def test_visregs_terms_are_the_papers() -> None:
    z, slices = normal(2, 7, 5), unit_slices(normal(5, 3, seed=1))
    expected = (shape_transcribed(z[0], slices) + shape_transcribed(z[1], slices)) / 2
    assert shape(z, slices).mean().item() == pytest.approx(expected, rel=1e-12)
    std = z.std(dim=1, correction=0)
    torch.testing.assert_close(scale(z), (1 - std).square().mean())
    torch.testing.assert_close(centre(z), z.mean(1).square().mean())


def test_shape_does_not_see_the_scale_and_takes_the_deviation_for_a_constant() -> None:
    z, slices = 100 * normal(1, 50, 4), unit_slices(normal(4, 8, seed=1))
    torch.testing.assert_close(shape(z, slices), shape(3 * z + 7, slices), rtol=1e-4, atol=1e-8)
    leaf = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(shape(leaf, slices).sum(), leaf)
    fixed = (z - z.mean(1, keepdim=True)) / (z.std(dim=1, correction=0, keepdim=True) + 1e-4)
    x = fixed.clone().requires_grad_()
    positions = torch.arange(1, 51, dtype=torch.float64) / 51
    value = ((x @ slices).sort(dim=1).values - torch.special.ndtri(positions)[:, None]).square().mean((0, 1)).sum()
    (expected,) = torch.autograd.grad(value, x)
    expected = (expected - expected.mean(1, keepdim=True)) / (z.std(dim=1, correction=0, keepdim=True) + 1e-4)
    torch.testing.assert_close(gradient, expected)


def test_order_of_images_does_not_matter() -> None:
    z, slices, order = normal(2, 20, 4), unit_slices(normal(4, 8, seed=1)), torch.arange(20).flip(0)
    torch.testing.assert_close(shape(z[:, order], slices), shape(z, slices))
    torch.testing.assert_close(statistic(z[:, order], slices), statistic(z, slices))
