import math

import pytest
import torch

from train.losses.clustering import entropy, sinkhorn, swapped_prediction


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def transcribed_sinkhorn(scores: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    """SwAV's appendix A.1, line by line."""
    q = (scores / epsilon).exp().T
    q = q / q.sum()
    k, b = q.shape
    r, c = torch.ones(k).double() / k, torch.ones(b).double() / b
    for _ in range(iterations):
        u = q.sum(dim=1)
        q = q * (r / u).unsqueeze(1)
        q = q * (c / q.sum(dim=0)).unsqueeze(0)
    return (q / q.sum(dim=0, keepdim=True)).T


def test_sinkhorn_is_the_papers() -> None:
    scores = normal(12, 5).tanh()
    torch.testing.assert_close(sinkhorn(scores, 0.05, 3), transcribed_sinkhorn(scores, 0.05, 3))


def test_marginals() -> None:
    """Each image has one unit to give, each prototype gets its share."""
    codes = sinkhorn(normal(12, 5).tanh(), 0.3, 100)
    torch.testing.assert_close(codes.sum(1), torch.ones(12).double())
    torch.testing.assert_close(codes.sum(0), torch.full((5,), 12 / 5).double())


def test_a_prototype_that_all_prefer_is_shared() -> None:
    """A constant that is added to a column or a row changes nothing: all images the same leave only uniform codes."""
    scores = normal(12, 5)
    moved = scores + 3 * normal(5) + 2 * normal(12, 1)
    torch.testing.assert_close(sinkhorn(moved, 0.5, 200), sinkhorn(scores, 0.5, 200))
    torch.testing.assert_close(sinkhorn(normal(5).expand(12, 5), 0.05, 1), torch.full((12, 5), 0.2).double())


def test_no_epsilon_overflows() -> None:
    assert sinkhorn(normal(12, 5).float(), 1e-4, 3).isfinite().all()


@pytest.mark.parametrize(("num_views", "num_targets"), [(2, 2), (5, 2), (3, 1)])
def test_swapped_prediction_pair_by_pair(num_views: int, num_targets: int) -> None:
    logits, targets = normal(num_views, 4, 6), normal(num_targets, 4, 6).softmax(-1)
    total, count = 0.0, 0
    for t in range(num_targets):
        for v in set(range(num_views)) - {t}:
            for image in range(4):
                p = logits[v, image].exp() / logits[v, image].exp().sum()
                total -= sum(float(targets[t, image, k]) * math.log(p[k]) for k in range(6))
                count += 1
    assert swapped_prediction(logits, targets).item() == pytest.approx(total / count, rel=1e-12)


def test_its_gradient_is_prediction_minus_target() -> None:
    logits, targets = normal(2, 4, 6).requires_grad_(), normal(2, 4, 6).softmax(-1)
    swapped_prediction(logits, targets).backward()
    expected = (logits.detach().softmax(-1) - targets.flip(0)) / (2 * 4)
    torch.testing.assert_close(logits.grad, expected)


def test_entropy() -> None:
    torch.testing.assert_close(entropy(torch.full((3, 8), 1 / 8)), torch.full((3,), math.log(8)))
    assert entropy(torch.eye(4)).abs().max() == 0
