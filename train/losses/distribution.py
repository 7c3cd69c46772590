"""Losses that give the embeddings of a batch a distribution: an isotropic Gaussian, or a dependence on the image."""

import torch

POINTS, T_MAX = 17, 3.0  # of SIGReg's integral: galilai-group/lejepa, MINIMAL.md


def unit_slices(normal: torch.Tensor) -> torch.Tensor:
    """Directions (D, K), uniform on the sphere, from standard normal numbers (D, K)."""
    return normal / normal.norm(dim=0)


def characteristic(z: torch.Tensor, slices: torch.Tensor) -> torch.Tensor:
    """The empirical characteristic function of z (..., n, D) along each of the ``slices`` (D, K).

    Returns (..., K, 17, 2): the means over n of cos(t x) and sin(t x), for t in [0, 3] and x = z slices. A mean over
    all images is that of means over equal parts of them.
    """
    tx = (z @ slices).unsqueeze(-1) * _points(z)
    return torch.stack([tx.cos().mean(-3), tx.sin().mean(-3)], dim=-1)


def sigreg(empirical: torch.Tensor, num_images: int) -> torch.Tensor:
    """SIGReg (Balestriero & LeCun, "LeJEPA", 2025): the statistic of Epps and Pulley, averaged over slices and views.

    ``N sum_t w(t) |empirical(t) - exp(-t^2 / 2)|^2`` with the trapezoid rule's weights on [-3, 3], times
    ``exp(-t^2 / 2)``. ``empirical`` (..., K, 17, 2) is the `characteristic` function of all N images. Under N(0, I) its
    expectation is ``sum_t w(t) (1 - exp(-t^2))``, whatever N; under any other distribution it grows as N.
    """
    t = _points(empirical)
    gaussian = (-t.square() / 2).exp()
    weights = 2 * (t[1] - t[0]) * gaussian  # twice: t and -t
    weights = torch.cat([weights[:1] / 2, weights[1:-1], weights[-1:] / 2])
    cosine, sine = empirical.unbind(-1)
    error = (cosine - gaussian).square() + sine.square()
    return num_images * (error @ weights).mean()


def _points(like: torch.Tensor) -> torch.Tensor:
    return torch.linspace(0, T_MAX, POINTS, dtype=like.dtype, device=like.device)


def centre(z: torch.Tensor) -> torch.Tensor:
    """VISReg's centre term (Wu et al., 2026, equation 6) of z (V, N, D): squared means of dimensions, averaged."""
    return z.mean(-2).square().mean()


def scale(z: torch.Tensor) -> torch.Tensor:
    """VISReg's scale term (equation 1) of z (V, N, D): ``(1 - std)^2``, averaged over dimensions and views."""
    return (1 - z.std(dim=-2, correction=0)).square().mean()


def shape(z: torch.Tensor, slices: torch.Tensor, eps: float = 1e-4) -> torch.Tensor:
    """VISReg's shape term (equations 2 to 5) of z (V, N, D) for each of the ``slices`` (D, K): (K,).

    The squared Wasserstein distance between the standardised embeddings along a slice, sorted, and the Gaussian's
    quantiles at i / (N + 1). No gradient passes through the standard deviation, which is the scale term's matter.
    """
    deviation = z.detach().std(dim=-2, correction=0, keepdim=True)
    standard = (z - z.mean(-2, keepdim=True)) / (deviation + eps)
    num_images = z.shape[-2]
    positions = torch.arange(1, num_images + 1, dtype=z.dtype, device=z.device) / (num_images + 1)
    along = (standard @ slices).sort(dim=-2).values
    return (along - torch.special.ndtri(positions)[:, None]).square().mean((0, 1))


def fourier_features(
    z: torch.Tensor, directions: torch.Tensor, radii: torch.Tensor, phases: torch.Tensor, c: float
) -> torch.Tensor:
    """Random features (..., F) of z (..., D), with ``E[f(x) . f(y)] = c / sqrt(c^2 + |x - y|^2)``.

    directions (D, F), radii (F,)    standard normal: the inverse multiquadric is a mixture of Gaussian kernels, since
                                     ``E_r exp(-r^2 |x - y|^2 / (2 c^2)) = (1 + |x - y|^2 / c^2)^(-1/2)``
    phases (F,)                      uniform in [0, 1), turns
    """
    angles = z @ (directions * radii / c) + 2 * torch.pi * phases
    return (2 / len(radii)) ** 0.5 * angles.cos()


def hsic_with_image(features: torch.Tensor) -> torch.Tensor:
    """HSIC(Z, Y), the dependence of embeddings on their image (Li et al., 2021), by features (M, N, F) of M views.

    The kernel ``k = f . f`` is summed over pairs of views of an image, and over all pairs:
    ``sum_i |sum_p f_ip|^2 / (N M (M - 1)) - |sum_ip f_ip|^2 / (N M)^2 - 1 / (M - 1)``, where the last is k of equals.
    """
    num_views, num_images, _ = features.shape
    of_image = features.sum(0).square().sum() / (num_images * num_views * (num_views - 1))
    return of_image - features.mean((0, 1)).square().sum() - 1 / (num_views - 1)


def hsic_with_itself(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """HSIC(Z, Z) (Li et al., 2021), biased, by two independent sets of features (M, N, F) of the same embeddings: the
    squared Frobenius norm of their cross-covariance."""
    a, b = a.flatten(0, 1), b.flatten(0, 1)
    return ((a - a.mean(0)).T @ (b - b.mean(0)) / len(a)).square().sum()
