"""The health of embeddings, without labels: how far views of an image agree and how much of the space is used.

All of it is computed where losses are logged, from two views of at most 512 images of the global batch, in at most 512
of their dimensions. So the numbers of embeddings with more dimensions are those of a part of them. How to read them:

    embedding_std     1 where embeddings go into all directions alike, 0 where all are the same
    z_std             standard deviation of the embeddings as they are, averaged over dimensions, of methods whose loss
                      sees their length: near 1 where it is kept up, 0 where all are the same
    alignment         0 where the views of an image agree, 2 where they are as far apart as those of different images
    uniformity        -4 for embeddings spread evenly over the sphere, 0 where all are the same
    rankme            the number of dimensions in use
    alpha_req         how fast their variances fall: near 1 is best, much above 1 few dimensions hold everything
    lidar             the number of dimensions that tell images apart rather than views of one
    contrast_top1_percent, contrast_top5_percent
                      how often the other view is the nearest, or of the nearest five, of all views but the same; for
                      MoCo v2 the teacher's key among the queue's; 0 where all are the same
    teacher_distance  of the teacher's weights from the student's, relative to the student's
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F

from train.losses.contrastive import contrast_accuracy, uniformity
from train.methods import Loss, Method
from train.model.teacher import distance
from train.processes.distributed import World

_MOST = 512  # images and dimensions: an eigendecomposition of this size takes milliseconds
_LIMITS = {"embedding_std": 0.05, "z_std": 0.1, "rankme": 1.5}  # of z_std losses want 1
_UNIFORM = 99.0  # teacher_entropy_percent
_TIMES = 2


def sample(embeddings: torch.Tensor) -> torch.Tensor:
    """A copy of two views of (V, b, D), in every so many of their dimensions."""
    return embeddings[:2, :, :: math.ceil(embeddings.shape[2] / _MOST)].detach().clone()


@torch.no_grad()
def measure(method: Method, loss: Loss, world: World) -> dict[str, torch.Tensor]:
    """The scalars above, the same on all ranks; those that compare views where there are two. Synchronises ranks."""
    assert loss.z is not None
    stride = math.ceil(loss.z.shape[1] * world.size / _MOST)
    z = world.gather(loss.z[:, ::stride].float().contiguous(), dim=1).double()
    found = {"embedding_std": embedding_std(z), "uniformity": uniformity(z)}
    if method.length_counts:
        found["z_std"] = z.std(dim=1, correction=0).mean()
    spectrum = _spectrum(z[0])
    found |= {"rankme": rankme(spectrum.sqrt()), "alpha_req": alpha_req(spectrum)}
    if len(z) > 1:
        found |= {"alignment": alignment(z), "lidar": lidar(z), **contrast(z)}
    if pairs := method.teachers():
        found["teacher_distance"] = distance(pairs)
    return found


def embedding_std(z: torch.Tensor) -> torch.Tensor:
    """Standard deviation of z (V, N, D) on the sphere, averaged over dimensions, times sqrt(D) (SimSiam, figure 2)."""
    return F.normalize(z, dim=-1).std(dim=1, correction=0).mean() * math.sqrt(z.shape[-1])


def alignment(z: torch.Tensor) -> torch.Tensor:
    """``E |x - y|^2`` of two views on the sphere (Wang & Isola, 2020, section 4.1)."""
    x, y = F.normalize(z[:2], dim=-1)
    return (x - y).square().sum(-1).mean()


def contrast(z: torch.Tensor) -> dict[str, torch.Tensor]:
    """`contrast_accuracy` of the first view's z (2, N, D) with the second's, among the 2 N - 2 of other images."""
    unit = F.normalize(z[:2], dim=-1)
    similarity = unit[0] @ unit.mT  # (2, N, N)
    positives = similarity[1].diagonal().clone()
    similarity.diagonal(dim1=1, dim2=2).fill_(float("-inf"))
    return contrast_accuracy(positives, torch.cat([*similarity], dim=1))


def rankme(singular_values: torch.Tensor) -> torch.Tensor:
    """exp of the entropy of singular values that sum to 1 (Garrido et al., "RankMe", 2023, equation 1)."""
    shares = singular_values / singular_values.sum().clamp_min(1e-30)
    return torch.special.entr(shares).sum().exp()


def alpha_req(spectrum: torch.Tensor) -> torch.Tensor:
    """Minus the slope of log eigenvalues over the logs of their ranks (Agrawal et al., "alpha-ReQ", 2022), by least
    squares from the 2nd to half of the eigenvalues, which come rising."""
    values = spectrum.flip(0)[1 : max(4, len(spectrum) // 2)].clamp_min(1e-30).log()
    ranks = torch.arange(2, len(values) + 2).to(values).log()
    centred = ranks - ranks.mean()
    return -(centred * values).sum() / centred.square().sum()


def lidar(z: torch.Tensor, delta: float = 1e-4) -> torch.Tensor:
    """`rankme` of the eigenvalues of ``W^-1/2 B W^-1/2`` (Thilak et al., "LiDAR", 2024): B is the covariance of images'
    means of z (V, N, D), W that of views about them plus ``delta``. Those of ``L^-1 B L^-T``, W = L L^T, are the same.
    """
    means = z.mean(0)
    between, within = means - means.mean(0), (z - means).flatten(0, 1)
    w = within.T @ within / (len(within) - len(means)) + delta * torch.eye(z.shape[2], dtype=z.dtype, device=z.device)
    root = torch.linalg.solve_triangular(torch.linalg.cholesky(w), between.T, upper=False)
    return rankme(_spectrum(root))


def _spectrum(a: torch.Tensor) -> torch.Tensor:
    """Squared singular values of a matrix, rising: eigenvalues of ``a a^T`` or ``a^T a``, whichever is smaller."""
    return torch.linalg.eigvalsh(a @ a.T if a.shape[0] < a.shape[1] else a.T @ a).clamp_min(0)


class Watch:
    """Says when embeddings have collapsed: a figure is below its limit, twice in a row, and has fallen to less than a
    third of its highest since the start (an untrained ViT's class tokens are nearly the same, and a run comes out); or
    a teacher's distributions are nearly uniform, and ``embedding_std`` has fallen to half. ``records`` are those of
    the run so far."""

    def __init__(self, records: Iterable[dict[str, Any]] = ()) -> None:
        self._highest = dict.fromkeys(_LIMITS, 0.0)
        self._times = 0
        for record in records:
            self(record)

    def __call__(self, measured: dict[str, Any]) -> str | None:
        """The name of the sign with its figures; None where there is none."""
        signs = []
        for name in _LIMITS.keys() & measured.keys():
            highest = self._highest[name] = max(measured[name], self._highest[name])
            if measured[name] < min(_LIMITS[name], highest / 3):
                kind = "dimensional" if name == "rankme" else "complete"
                signs.append(f"{kind} collapse: {name} is {measured[name]:.2g} and was {highest:.2g}")
        entropy = measured.get("teacher_entropy_percent", 0.0)
        if entropy > _UNIFORM and measured["embedding_std"] < self._highest["embedding_std"] / 2:
            signs.append(f"collapse to the uniform distribution: teacher_entropy_percent is {entropy:.2f}")
        self._times = self._times + 1 if signs else 0
        return min(signs) if self._times >= _TIMES else None
