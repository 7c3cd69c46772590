import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.processes import run_ranks
from train.losses import contrastive
from train.losses.contrastive import align_uniform, dcl, dclw, info_nce, log_sum_exp, nt_xent, spectral
from train.processes.distributed import World

LOSSES = {
    "ntxent": partial(nt_xent, temperature=0.2),
    "dcl": partial(dcl, temperature=0.2),
    "dclw": partial(dclw, temperature=0.2),
    "spectral": spectral,
    "align_uniform": align_uniform,
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


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


def doubles(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def decoupled(z: torch.Tensor, temperature: float, sigma: float | None = None) -> list[torch.Tensor]:
    """DCL and, with a sigma, DCLW of each anchor of (2, N, D) embeddings, loop by loop."""
    z, anchors = F.normalize(z, dim=-1), []
    alike = [torch.exp(z[0, i] @ z[1, i] / (sigma or 1)) for i in range(z.shape[1])]
    for v, i in itertools.product(range(2), range(z.shape[1])):
        weight = 1 if sigma is None else 2 - alike[i] / torch.stack(alike).mean()
        negatives = [z[v, i] @ z[w, j] / temperature for w in range(2) for j in range(z.shape[1]) if j != i]
        anchors.append(-weight * (z[0, i] @ z[1, i]) / temperature + torch.stack(negatives).exp().sum().log())
    return anchors


def transcribed_spectral(z: torch.Tensor) -> torch.Tensor:
    """The two terms of the paper, on (2, N, D) embeddings of a length below 1."""
    pairs = [(z[0, i] @ z[1, j]) ** 2 for i in range(z.shape[1]) for j in range(z.shape[1]) if i != j]
    return -2 * torch.stack([a @ b for a, b in zip(z[0], z[1], strict=True)]).mean() + torch.stack(pairs).mean()


def transcribed_align_uniform(z: torch.Tensor) -> torch.Tensor:
    """The implementation that the paper prints, on (2, N, D) embeddings."""
    x, y = F.normalize(z, dim=-1)
    uniform = [torch.pdist(one).pow(2).mul(-2).exp().mean().log() for one in (x, y)]
    return (x - y).norm(dim=1).pow(2).mean() + sum(uniform) / 2


@pytest.mark.parametrize(
    ("loss", "transcription"),
    [
        (LOSSES["dcl"], lambda z: torch.stack(decoupled(z, 0.2)).mean()),
        (LOSSES["dclw"], lambda z: torch.stack(decoupled(z, 0.2, sigma=0.5)).mean()),
        (spectral, transcribed_spectral),
        (align_uniform, transcribed_align_uniform),
    ],
    ids=["dcl", "dclw", "spectral", "align_uniform"],
)
def test_values_and_gradients_are_the_papers(loss: Any, transcription: Any) -> None:
    z = (0.2 * doubles(2, 6, 5)).requires_grad_()
    found, expected = loss(z, z, 0), transcription(z)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(value, z)[0] for value in (found, expected)))


@every_loss
@pytest.mark.parametrize("num_views", [2, 4])
def test_parts_average_to_the_whole_and_so_do_their_gradients(loss: Any, num_views: int) -> None:
    z = (0.3 * doubles(num_views, 6, 5)).requires_grad_()
    parts = torch.stack([loss(z[:, i : i + 2], z, i) for i in (0, 2, 4)]).mean()
    whole = loss(z, z, 0)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(value, z)[0] for value in (parts, whole)))


@every_loss
def test_images_and_views_can_be_exchanged(loss: Any) -> None:
    z = 0.3 * doubles(3, 6, 5)
    for other in (z.flip(0), z.flip(1)):
        torch.testing.assert_close(loss(other, other, 0), loss(z, z, 0), rtol=1e-12, atol=1e-12)


def test_dcl_is_nt_xent_without_the_positive_in_the_denominator() -> None:
    """So an anchor's NT-Xent is log(1 + exp(its DCL))."""
    z = doubles(2, 6, 5)
    anchors = torch.stack(decoupled(z, 0.2))
    torch.testing.assert_close(dcl(z, z, 0, 0.2), anchors.mean())
    torch.testing.assert_close(nt_xent(z, z, 0, 0.2), F.softplus(anchors).mean())


def test_dclw_of_equally_similar_pairs_is_dcl() -> None:
    z = doubles(1, 6, 5).expand(2, 6, 5)
    torch.testing.assert_close(dclw(z, z, 0, 0.2), dcl(z, z, 0, 0.2))


def population(num_images: int = 2, num_views: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probabilities (n, m) that a view is made of an image; of each view w; the normalised adjacency of views."""
    views = doubles(num_images, num_views).softmax(1)
    joint = views.T @ views / num_images
    w = joint.sum(1)
    return views, w, joint / (w[:, None] * w).sqrt()


def expected_spectral(f: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
    """Over all batches of two views of each of two images; f (m, D), a row a view."""
    expected = torch.zeros(()).double()
    for i, j in itertools.product(range(2), repeat=2):
        for a, b, c, d in itertools.product(range(3), repeat=4):
            z = torch.stack([f[[a, c]], f[[b, d]]])
            expected += views[i, a] * views[i, b] * views[j, c] * views[j, d] / 4 * spectral(z, z, 0, mu=math.inf)
    return expected


def test_spectral_is_in_expectation_a_matrix_factorisation() -> None:
    """Lemma 3.2: |A - F F^T|^2 less |A|^2, with rows sqrt(w) f."""
    (views, w, adjacency), f = population(), doubles(3, 2)
    factors = w.sqrt()[:, None] * f
    factorised = (adjacency - factors @ factors.T).square().sum() - adjacency.square().sum()
    torch.testing.assert_close(expected_spectral(f, views), factorised, rtol=1e-10, atol=1e-10)


def test_spectral_is_least_at_the_first_eigenvectors() -> None:
    views, w, adjacency = population()
    eigenvalues, eigenvectors = torch.linalg.eigh(adjacency)
    f = (eigenvectors[:, 1:] * eigenvalues[1:].sqrt() / w.sqrt()[:, None]).requires_grad_()
    least = expected_spectral(f, views)
    assert least.item() == pytest.approx(-float(eigenvalues[1:].square().sum()))
    assert torch.autograd.grad(least, f)[0].abs().max() < 1e-9


def test_spectral_cuts_long_embeddings_alone() -> None:
    z = F.normalize(doubles(2, 6, 5), dim=-1)
    torch.testing.assert_close(spectral(7 * z, 7 * z, 0, mu=4), spectral(2 * z, 2 * z, 0, mu=math.inf))
    torch.testing.assert_close(spectral(z, z, 0, mu=4), spectral(z, z, 0, mu=math.inf))


def test_known_values_of_orthogonal_and_of_equal_embeddings() -> None:
    apart, same = torch.eye(6).double().expand(2, 6, 6), torch.ones(2, 6, 5).double()
    assert spectral(apart, apart, 0).item() == pytest.approx(-2)
    assert spectral(same, same, 0).item() == pytest.approx(-1)
    assert align_uniform(apart, apart, 0).item() == pytest.approx(-4)
    assert align_uniform(same, same, 0).item() == pytest.approx(0, abs=1e-12)
    assert dcl(apart, apart, 0, 0.5).item() == pytest.approx(math.log(10) - 2)
    assert dcl(same, same, 0, 0.5).item() == pytest.approx(math.log(10))


def test_info_nce_is_a_cross_entropy_among_the_keys() -> None:
    queries, keys = doubles(3, 5), doubles(7, 5)
    logits = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).T / 0.2
    torch.testing.assert_close(info_nce(queries, keys, 2, 0.2), F.cross_entropy(logits, torch.arange(2, 5)))


def set_tile(patch: pytest.MonkeyPatch, num_anchors: int | None, num_others: int) -> None:
    """So many anchors at a time, or all."""
    patch.setattr(contrastive, "_WHOLE", 0 if num_anchors else 2**40)
    patch.setattr(contrastive, "_TILE", (num_anchors or 1) * num_others)


@pytest.mark.parametrize("tile", [1, 5, 7, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_tiles_have_the_value_and_the_gradients_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, tile: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Of anchors that are the second process's, among keys that are not the same tensor."""
    results = []
    for size in (None, tile):
        set_tile(monkeypatch, size, 36)
        z, keys = (t.to(dtype).requires_grad_() for t in (doubles(3, 4, 8), doubles(3, 12, 8)))
        value = nt_xent(z, keys, 4, 0.2)
        results.append([value, *torch.autograd.grad(value, [z, keys])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tile", [None, 1, 2])
def test_what_is_excluded_is_not_summed(monkeypatch: pytest.MonkeyPatch, tile: int | None) -> None:
    anchors, others = doubles(3, 5), doubles(9, 5)
    excluded = torch.tensor([[0, 8], [3, 4], [5, 2]])
    kept = [[o for o in range(9) if o not in row] for row in excluded.tolist()]
    expected = torch.stack([(others[o] @ a / 0.1).logsumexp(0) for a, o in zip(anchors, kept, strict=True)])
    set_tile(monkeypatch, tile, 9)
    torch.testing.assert_close(log_sum_exp(anchors, others, excluded, 0.1), expected)


class Largest(TorchDispatchMode):
    """The greatest number of elements of any tensor that an operation returns."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.num_elements = max(self.num_elements, result.numel())
        return result


def test_the_matrix_of_a_large_batch_is_never_held() -> None:
    z = torch.randn(2, 3000, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert contrastive._WHOLE < (2 * 3000) ** 2
    with Largest() as largest:
        nt_xent(z, z, 0, 0.5).backward()
    assert largest.num_elements <= contrastive._TILE


def tiled_by_rank(world: World, tile: int | None) -> list[torch.Tensor]:
    """The mean loss, and the gradient of this rank's embeddings as DDP would average it."""
    patch = pytest.MonkeyPatch()
    set_tile(patch, tile, 24)
    per_rank = 12 // world.size
    z = doubles(2, 12, 5)[:, world.rank * per_rank :][:, :per_rank].clone().requires_grad_()
    loss = nt_xent(z, world.gather(z, dim=1), world.rank * per_rank, 0.2)
    loss.backward()
    patch.undo()
    return [world.mean(loss), torch.as_tensor(z.grad) / world.size]


@pytest.mark.parametrize("world_size", [2, 3])
def test_tiles_pass_their_gradients_to_the_ranks_that_the_columns_came_from(world_size: int) -> None:
    value, gradient = tiled_by_rank(World(), None)
    ranks = run_ranks(tiled_by_rank, world_size, 5)
    torch.testing.assert_close(torch.cat([found[1] for found in ranks], dim=1), gradient, rtol=1e-12, atol=1e-12)
    for found in ranks:
        torch.testing.assert_close(found[0], value, rtol=1e-12, atol=1e-12)
