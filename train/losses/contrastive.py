"""Losses that tell the views of an image from those of other images."""

import math
from functools import partial
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

_WHOLE = 2**25  # logits, 128 MiB in float32: more of them are made tile by tile
_TILE = 2**24


def nt_xent(z: torch.Tensor, keys: torch.Tensor, offset: int, temperature: float) -> torch.Tensor:
    """The normalised temperature-scaled cross entropy of SimCLR (Chen et al., 2020, equation 1).

    z       (V, b, D) embeddings of V views of the b anchor images
    keys    (V, B, D) embeddings of the whole batch, in which the anchors are rows ``offset`` to ``offset + b``

    For each anchor and each of its V - 1 positives, the cross entropy of the positive against all other embeddings
    but the anchor itself; the mean over anchors and positives, a scalar. For V = 2 this is the paper's loss.
    """
    return _contrast(z, keys, offset, temperature, 1)


def dcl(z: torch.Tensor, keys: torch.Tensor, offset: int, temperature: float) -> torch.Tensor:
    """The decoupled contrastive loss (Yeh et al., "Decoupled contrastive learning", 2022, section 3): NT-Xent with no
    embedding of the anchor's own image in the denominator. Arguments as of `nt_xent`; a scalar, which may be negative.
    """
    return _contrast(z, keys, offset, temperature, len(z))


def dclw(z: torch.Tensor, keys: torch.Tensor, offset: int, temperature: float, sigma: float = 0.5) -> torch.Tensor:
    """DCL with its positive terms weighted by ``2 - e / mean(e)``, ``e = exp(cosine / sigma)`` (section 3 of the same):
    less where the two views are alike. The mean is over the whole batch's pairs of these two views. As in the authors'
    code, gradients pass through the weights."""
    unit = F.normalize(keys, dim=-1)
    alike = (_positives(unit, unit, 0) / sigma).exp()
    weights = 2 - alike / alike.mean(-1, keepdim=True)
    return _contrast(z, keys, offset, temperature, len(z), weights[..., offset : offset + z.shape[1]])


def spectral(z: torch.Tensor, keys: torch.Tensor, offset: int, mu: float = 1.0) -> torch.Tensor:
    """The spectral contrastive loss (HaoChen et al., "Provable guarantees for self-supervised deep learning with
    spectral contrastive loss", 2021, section 3.2): ``-2 E[f(x) f(x+)] + E[(f(x) f(x'))^2]`` over ordered pairs of
    different views, x' of a different image, which leaves no bias. ``z`` and ``keys`` as of `nt_xent`, but their
    lengths count: those above ``sqrt(mu)`` are cut to it, as in the authors' code."""
    (num_views, num_anchors, _), num_images = z.shape, keys.shape[1]
    z, keys = _within(z, mu), _within(keys, mu)
    dots = torch.stack([z[v] @ keys[w].T for v, w in permutations(range(num_views), 2)])  # (V (V - 1), b, B)
    own = dots.diagonal(offset, dim1=1, dim2=2)[:, :num_anchors]
    others = (dots.square().sum() - own.square().sum()) / (own.numel() * (num_images - 1))
    return others - 2 * own.mean()


def align_uniform(z: torch.Tensor, keys: torch.Tensor, offset: int) -> torch.Tensor:  # noqa: ARG001  # as the others
    """Alignment + uniformity on the sphere (Wang & Isola, "Understanding contrastive representation learning through
    alignment and uniformity", 2020, section 4, alpha = t = 2): ``E |x - y|^2`` over pairs of views, plus `uniformity`.
    ``z`` and ``keys`` as of `nt_xent`; every rank computes the second term of the whole batch, because it is the
    logarithm of a mean."""
    first, second = torch.triu_indices(len(z), len(z), 1, device=z.device)
    anchors = F.normalize(z, dim=-1)
    return (anchors[first] - anchors[second]).square().sum(-1).mean() + uniformity(keys)


def uniformity(z: torch.Tensor) -> torch.Tensor:
    """``log E exp(-2 |x - x'|^2)`` over pairs of different images of a view of z (V, N, D) on the sphere, averaged over
    views (Wang & Isola, 2020, section 4.1)."""
    unit, num_images = F.normalize(z, dim=-1), z.shape[1]
    exponents = 4 * (unit @ unit.mT - 1)  # -2 |x - x'|^2 of vectors of length 1: (V, N, N)
    itself = torch.eye(num_images, dtype=torch.bool, device=z.device)
    sums = exponents.masked_fill(itself, float("-inf")).flatten(1).logsumexp(1)
    return (sums - math.log(num_images * (num_images - 1))).mean()


def _contrast(
    z: torch.Tensor, keys: torch.Tensor, offset: int, temperature: float, num_excluded: int, weights: Any = 1.0
) -> torch.Tensor:
    """The mean over anchors of the denominators, without the first ``num_excluded`` of `_columns`, less that of the
    positives times ``weights`` (V - 1, V, b)."""
    z, keys = F.normalize(z, dim=-1), F.normalize(keys, dim=-1)
    excluded = _columns(z, keys, offset)[:, :num_excluded]
    denominators = log_sum_exp(z.flatten(0, 1), keys.flatten(0, 1), excluded, temperature)
    return denominators.mean() - (weights * _positives(z, keys, offset)).mean() / temperature


def _positives(z: torch.Tensor, keys: torch.Tensor, offset: int) -> torch.Tensor:
    """Dot products (V - 1, V, b) of each anchor with the next view of its image, the one after that, and so on."""
    own = keys[:, offset : offset + z.shape[1]]
    return torch.stack([(z * own.roll(-shift, 0)).sum(-1) for shift in range(1, len(z))])


def _columns(z: torch.Tensor, keys: torch.Tensor, offset: int) -> torch.Tensor:
    """Where the anchors' images (V * b, V) are among the V * B embeddings: the anchor itself, then the next views."""
    views, images = (torch.arange(n, device=z.device) for n in z.shape[:2])
    others = (views[:, None] + views) % len(z)
    return (others[:, None] * keys.shape[1] + offset + images[:, None]).flatten(0, 1)


def log_sum_exp(
    anchors: torch.Tensor, others: torch.Tensor, excluded: torch.Tensor, temperature: float
) -> torch.Tensor:
    """``log(sum(exp(a . o / temperature)))`` (A,) of anchors (A, D) over the others (K, D), but for those whose
    numbers are in ``excluded`` (A, E). Where there are many logits, those of few anchors are held at a time, and made
    once more for the gradient."""
    if len(anchors) * len(others) <= _WHOLE:
        return _at_once(anchors, others, excluded, temperature)
    tile, made_twice = max(1, _TILE // len(others)), partial(checkpoint, _at_once, use_reentrant=False)
    pairs = zip(anchors.split(tile), excluded.split(tile), strict=True)
    return torch.cat([made_twice(a, others, e, temperature, preserve_rng_state=False) for a, e in pairs])


def _at_once(anchors: torch.Tensor, others: torch.Tensor, excluded: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = (anchors / temperature) @ others.T
    return logits.scatter_(1, excluded, float("-inf")).logsumexp(1)


def _within(z: torch.Tensor, mu: float) -> torch.Tensor:
    """The nearest vectors of a squared length of at most ``mu``."""
    return z / (z.norm(dim=-1, keepdim=True) / math.sqrt(mu)).clamp_min(1)


def sup_con(
    z: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor, key_labels: torch.Tensor, offset: int, temperature: float
) -> torch.Tensor:
    """The supervised contrastive loss L_out (Khosla et al., 2020, equation 2), averaged over anchors, a scalar.

    z       (V, b, D), labels (b,): embeddings of V views of the b anchor images, and their classes
    keys    (V, B, D), key_labels (B,): those of the whole batch, of which the anchors are rows ``offset`` onwards

    For each anchor, the cross entropy of each embedding of its class against all others, averaged over them.
    """
    num_views, num_anchors, _ = z.shape
    logits = F.normalize(z, dim=-1).flatten(0, 1) @ F.normalize(keys, dim=-1).flatten(0, 1).T / temperature
    rows = torch.arange(num_views * num_anchors, device=z.device)
    own = offset + rows % num_anchors + keys.shape[1] * (rows // num_anchors)
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, own[:, None], False)
    positives = others & (labels.repeat(num_views)[:, None] == key_labels.repeat(num_views))
    denominators = logits.masked_fill(~others, float("-inf")).logsumexp(1)
    return (denominators - (logits * positives).sum(1) / positives.sum(1)).mean()


def info_nce(queries: torch.Tensor, keys: torch.Tensor, offset: int, temperature: float) -> torch.Tensor:
    """InfoNCE (van den Oord et al., 2018, equation 4) among the keys of a batch, as a mean over queries, a scalar.

    queries  (b, D) of b images
    keys     (B, D) of the whole batch, in which the queries' positives are rows ``offset`` to ``offset + b``
    """
    queries, keys = F.normalize(queries, dim=-1), F.normalize(keys, dim=-1)
    none = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    positives = (queries * keys[offset : offset + len(queries)]).sum(-1)
    return (log_sum_exp(queries, keys, none, temperature) - positives / temperature).mean()


def queue_logits(q: torch.Tensor, k: torch.Tensor, queue: torch.Tensor, temperature: float) -> torch.Tensor:
    """Of MoCo's InfoNCE (He et al., 2020, equation 1), (b, 1 + K): each query (b, D) with its key (b, D), then with a
    ``queue`` (K, D) of keys of length 1, which are all negatives. The loss is their cross entropy with class 0."""
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return torch.cat([(q * k).sum(-1, keepdim=True), q @ queue.T], dim=1) / temperature


@torch.no_grad()
def contrast_accuracy(positives: torch.Tensor, others: torch.Tensor) -> dict[str, torch.Tensor]:
    """Percent of anchors whose similarity to the positive (n,) is above those to all ``others`` (n, K), or to all but
    four. Equal ones count against it, so collapsed embeddings have 0."""
    better = (others >= positives[:, None]).sum(1)
    return {f"contrast_top{k}_percent": 100 * (better < k).double().mean() for k in (1, 5)}
