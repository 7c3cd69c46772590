import math

import pytest
import torch

from train.losses.contrastive import nt_xent


def transcribed(z: torch.Tensor, temperature: float) -> float:
    """Algorithm 1 of the SimCLR paper, loop by loop, on (2, N, D) embeddings."""
    rows = [z[view, i] for i in range(z.shape[1]) for view in range(2)]
    n = len(rows)
    s = [[float(torch.dot(a, b) / (a.norm() * b.norm())) for b in rows] for a in rows]

    def pair_loss(i: int, j: int) -> float:
        denominator = sum(math.exp(s[i][k] / temperature) for k in range(n) if k != i)
        return -math.log(math.exp(s[i][j] / temperature) / denominator)

    return sum(pair_loss(2 * k, 2 * k + 1) + pair_loss(2 * k + 1, 2 * k) for k in range(n // 2)) / n


def embeddings(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float()


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_is_the_papers(temperature: float) -> None:
    z = embeddings(2, 6, 5)
    assert nt_xent(z, z, 0, temperature).item() == pytest.approx(transcribed(z, temperature), rel=1e-5)


def test_parts_of_the_batch_average_to_the_whole() -> None:
    z = embeddings(2, 6, 5)
    parts = [nt_xent(z[:, i : i + 2], z, i, 0.2) for i in (0, 2, 4)]
    assert torch.stack(parts).mean().item() == pytest.approx(nt_xent(z, z, 0, 0.2).item(), rel=1e-5)


def test_known_value_of_equal_embeddings() -> None:
    z = torch.ones(2, 8, 4)
    assert nt_xent(z, z, 0, 0.1).item() == pytest.approx(math.log(15), rel=1e-5)


def test_invariant_to_length_and_rotation() -> None:
    z = embeddings(2, 6, 5)
    rotation, _ = torch.linalg.qr(embeddings(5, 5))
    expected = nt_xent(z, z, 0, 0.3).item()
    turned = 7 * z @ rotation
    assert nt_xent(turned, turned, 0, 0.3).item() == pytest.approx(expected, rel=1e-4)


def test_many_views_average_over_positives() -> None:
    """With V views, each anchor has V - 1 positives and every other embedding in its denominator."""
    z = embeddings(3, 4, 5)
    rows = torch.nn.functional.normalize(z, dim=-1).flatten(0, 1)
    logits = rows @ rows.T / 0.2
    total = 0.0
    for a in range(12):
        denominator = torch.cat([logits[a, :a], logits[a, a + 1 :]]).logsumexp(0)
        positives = [logits[a, p] for p in range(12) if p % 4 == a % 4 and p != a]
        total += float(sum(denominator - p for p in positives)) / 2
    assert nt_xent(z, z, 0, 0.2).item() == pytest.approx(total / 12, rel=1e-5)


def test_gradient_spreads_a_collapsing_batch() -> None:
    """Near collapse a step against the gradient makes different images less similar."""
    z = (torch.ones(2, 4, 8) + 0.01 * embeddings(2, 4, 8)).requires_grad_()
    nt_xent(z, z, 0, 0.1).backward()
    assert z.grad is not None

    def similarity(rows: torch.Tensor) -> float:
        rows = torch.nn.functional.normalize(rows[0], dim=-1)
        return float((rows @ rows.T).mean())

    assert similarity(z.detach() - 0.1 * z.grad) < similarity(z.detach())
