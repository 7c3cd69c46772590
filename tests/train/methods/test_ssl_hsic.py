import pytest
import torch
import torch.nn.functional as F

from train.losses.distribution import fourier_features, hsic_with_image, hsic_with_itself
from train.methods import Update, build_method
from train.methods.networks import Matches
from train.methods.ssl_hsic import SSLHSIC, SSLHSICConfig
from train.model.draws import Draws
from train.model.encoder import EncoderConfig
from train.processes.distributed import World

DRAWS = Draws(0, 0, torch.arange(6))


def ssl_hsic(**settings: float) -> SSLHSIC:
    torch.manual_seed(0)
    config = SSLHSICConfig.model_validate({"hidden": 16, "out": 8, **settings})
    method = build_method(config, EncoderConfig(name="resnet18", width=8), World())
    assert isinstance(method, SSLHSIC)
    return method


def normal(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kernel(x: torch.Tensor, y: torch.Tensor, c: float) -> torch.Tensor:
    return c / (c**2 + (x - y).square().sum(-1)).sqrt()


@pytest.mark.parametrize("c", [0.5, 1.0, 2.0])
def test_features_approximate_the_inverse_multiquadric(c: float) -> None:
    z, size = normal(8, 5), 400_000
    phases = torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    features = fourier_features(z, normal(5, size, seed=1), normal(size, seed=2), phases, c)
    torch.testing.assert_close(features @ features.T, kernel(z[:, None], z, c), rtol=0, atol=0.01)


def test_dependence_on_the_image_is_the_papers_estimator() -> None:
    """Sum by sum over i, j, p, l, for a kernel that is a product of features of unit length."""
    f = F.normalize(normal(3, 4, 5), dim=-1)
    m, n = 3, 4
    same = sum(float(f[p, i] @ f[q, i]) for i in range(n) for p in range(m) for q in range(m))
    every = sum(float(f[p, i] @ f[q, j]) for i in range(n) for j in range(n) for p in range(m) for q in range(m))
    expected = same / (n * m * (m - 1)) - every / (n * m) ** 2 - 1 / (m - 1)
    assert hsic_with_image(f).item() == pytest.approx(expected, rel=1e-12)


def test_dependence_on_itself_is_the_trace_of_centred_kernels() -> None:
    """``tr(K H J H) / n^2`` with K and J the kernels of the two sets of features."""
    a, b = normal(2, 4, 6), normal(2, 4, 6, seed=1)
    k, j = (f.flatten(0, 1) @ f.flatten(0, 1).T for f in (a, b))
    h = torch.eye(8, dtype=torch.float64) - 1 / 8
    torch.testing.assert_close(hsic_with_itself(a, b), torch.trace(k @ h @ j @ h) / 64)


def test_loss_and_gradient_are_the_papers_with_exact_kernels() -> None:
    """The loss of many features against the exact kernel's."""
    online, target = normal(2, 6, 8).requires_grad_(), normal(2, 6, 8, seed=1)
    loss = ssl_hsic(features=4_000).loss(Matches(online, target, online), None, DRAWS).value
    z = F.normalize(torch.cat([online, target]), dim=-1)
    k = kernel(z.flatten(0, 1)[:, None], z.flatten(0, 1), 1.0)
    same = torch.stack([kernel(z[:, None, i], z[:, i], 1.0).sum() for i in range(6)]).sum()
    with_image = same / (6 * 4 * 3) - k.mean() - 1 / 3
    h = torch.eye(24, dtype=torch.float64) - 1 / 24
    expected = 3 * torch.trace(k @ h @ k @ h).sqrt() / 24 - with_image
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)
    found, exact = (torch.autograd.grad(value, online)[0].flatten() for value in (loss, expected))
    assert F.cosine_similarity(found, exact, dim=0) > 0.95


def test_at_collapse_there_is_no_dependence_and_the_gradient_is_finite() -> None:
    online = torch.ones(2, 8, 8, dtype=torch.float64, requires_grad=True)  # 32 equal rows: their mean is exact
    loss = ssl_hsic().loss(Matches(online, torch.ones(2, 8, 8, dtype=torch.float64), online), None, DRAWS)
    (gradient,) = torch.autograd.grad(loss.value, online)
    assert abs(loss.metrics["hsic_image"].item()) < 0.1  # but for the features' error in k(z, z) = 1
    assert gradient.isfinite().all()
    apart = F.one_hot(torch.arange(6), 8).double().expand(2, 6, 8)
    assert ssl_hsic().loss(Matches(apart, apart, apart), None, DRAWS).metrics["hsic_image"].item() > 0.25


def test_where_embeddings_are_exactly_equal_the_root_has_a_gradient() -> None:
    """Of two equal rows the mean is exact, HSIC(Z, Z) is 0, and the root's own slope would be infinite."""
    online = torch.ones(1, 1, 8, dtype=torch.float64, requires_grad=True)
    loss = ssl_hsic().loss(Matches(online, online.detach(), online), None, DRAWS)
    assert loss.metrics["hsic_self"] == 0
    assert torch.autograd.grad(loss.value, online)[0].isfinite().all()


def test_target_follows_the_online_network() -> None:
    method = ssl_hsic(tau=0.5)
    online, target = next(method.projector.parameters()), next(method.teacher_projector.parameters())
    before = target.clone()
    with torch.no_grad():
        online.add_(1)
        method.after_update(Update(0.0, torch.tensor(0.0), None))
        torch.testing.assert_close(target, before)
        method.after_update(Update(0.0, torch.tensor(1.0), None))
        torch.testing.assert_close(target, before + 0.5)
    assert not any(p.requires_grad for p in method.teacher_encoder.parameters())


def test_target_takes_no_gradient() -> None:
    online, target = normal(2, 6, 8).requires_grad_(), normal(2, 6, 8, seed=1).requires_grad_()
    ssl_hsic().loss(Matches(online, target, online), None, DRAWS).value.backward()
    assert online.grad is not None
    assert target.grad is None
