"""Losses that tell the views of an image from those of other images."""

import math

import torch
import torch.nn.functional as F


def nt_xent(z: torch.Tensor, keys: torch.Tensor, offset: int, temperature: float) -> torch.Tensor:
    """The normalised temperature-scaled cross entropy of SimCLR (Chen et al., 2020, equation 1).

    z       (V, b, D) embeddings of V views of the b anchor images
    keys    (V, B, D) embeddings of the whole batch, in which the anchors are rows ``offset`` to ``offset + b``

    For each anchor and each of its V - 1 positives, the cross entropy of the positive against all other embeddings
    but the anchor itself; the mean over anchors and positives, a scalar. For V = 2 this is the paper's loss.
    """
    logits, columns, own = _against_all(z, keys, offset, temperature)
    positives = logits.gather(1, columns)
    logits = logits.scatter(1, columns[own][:, None], float("-inf"))
    return (logits.logsumexp(1) - positives[~own].view(len(logits), -1).mean(1)).mean()


def dcl(z: torch.Tensor, keys: torch.Tensor, offset: int, temperature: float) -> torch.Tensor:
    """The decoupled contrastive loss (Yeh et al., "Decoupled contrastive learning", 2022, section 3): NT-Xent with no
    embedding of the anchor's own image in the denominator. Arguments as of `nt_xent`; a scalar, which may be negative.
    """
    return _decoupled(z, keys, offset, temperature, z.new_ones(len(z), len(z), z.shape[1]))


def dclw(z: torch.Tensor, keys: torch.Tensor, offset: int, temperature: float, sigma: float = 0.5) -> torch.Tensor:
    """DCL with its positive terms weighted by ``2 - e / mean(e)``, ``e = exp(cosine / sigma)`` (section 3 of the same):
    less where the two views are alike. The mean is over the whole batch's pairs of these two views. As in the authors'
    code, gradients pass through the weights."""
    unit = F.normalize(keys, dim=-1)
    alike = (torch.einsum("vbd,wbd->vwb", unit, unit) / sigma).exp()
    weights = 2 - alike / alike.mean(-1, keepdim=True)
    return _decoupled(z, keys, offset, temperature, weights[:, :, offset : offset + z.shape[1]])


def spectral(z: torch.Tensor, keys: torch.Tensor, offset: int, mu: float = 1.0) -> torch.Tensor:
    """The spectral contrastive loss (HaoChen et al., "Provable guarantees for self-supervised deep learning with
    spectral contrastive loss", 2021, section 3.2): ``-2 E[f(x) f(x+)] + E[(f(x) f(x'))^2]`` over ordered pairs of
    different views, x' of a different image, which leaves no bias. ``z`` and ``keys`` as of `nt_xent`, but their
    lengths count: those above ``sqrt(mu)`` are cut to it, as in the authors' code."""
    (num_views, num_anchors, _), num_images = z.shape, keys.shape[1]
    dots = torch.einsum("vbd,wcd->vwbc", _within(z, mu), _within(keys, mu))
    dots = dots[~torch.eye(num_views, dtype=torch.bool, device=z.device)]  # (V (V - 1), b, B)
    own = dots.diagonal(offset, dim1=1, dim2=2)[:, :num_anchors]
    others = (dots.square().sum() - own.square().sum()) / (own.numel() * (num_images - 1))
    return others - 2 * own.mean()


def align_uniform(
    z: torch.Tensor,
    keys: torch.Tensor,
    offset: int,  # noqa: ARG001  # as the other losses; here no pair of ``keys`` is apart from the others
    alpha: float = 2,
    t: float = 2,
) -> torch.Tensor:
    """Alignment + uniformity on the sphere (Wang & Isola, "Understanding contrastive representation learning through
    alignment and uniformity", 2020, section 4): ``E |x - y|^alpha`` over pairs of views, plus the mean over views of
    ``log E exp(-t |x - x'|^2)`` over pairs of different images. ``z`` and ``keys`` as of `nt_xent`; every rank computes
    the second term of the whole batch, because it is the logarithm of a mean."""
    (num_views, num_images, _), unit = keys.shape, F.normalize(keys, dim=-1)
    first, second = torch.triu_indices(num_views, num_views, 1, device=z.device)
    anchors = F.normalize(z, dim=-1)
    alignment = (anchors[first] - anchors[second]).norm(dim=-1).pow(alpha).mean()
    exponents = 2 * t * (unit @ unit.mT - 1)  # -t |x - x'|^2 of vectors of length 1: (V, B, B)
    itself = torch.eye(num_images, dtype=torch.bool, device=z.device)
    sums = exponents.masked_fill(itself, float("-inf")).flatten(1).logsumexp(1)
    return alignment + (sums - math.log(num_images * (num_images - 1))).mean()


def _against_all(
    z: torch.Tensor, keys: torch.Tensor, offset: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (V * b, V * B) of anchors against all embeddings; the columns (V * b, V) in which each anchor's image is;
    which of these (V * b, V) is the anchor itself."""
    num_views, num_anchors, _ = z.shape
    anchors = F.normalize(z, dim=-1).flatten(0, 1)
    others = F.normalize(keys, dim=-1).flatten(0, 1)
    rows = torch.arange(num_views * num_anchors, device=z.device)
    images = offset + rows % num_anchors
    columns = images[:, None] + keys.shape[1] * torch.arange(num_views, device=z.device)
    return anchors @ others.T / temperature, columns, F.one_hot(rows // num_anchors, num_views).bool()


def _decoupled(
    z: torch.Tensor, keys: torch.Tensor, offset: int, temperature: float, weights: torch.Tensor
) -> torch.Tensor:
    """``weights`` (V, V, b) of the positives of each pair of views."""
    logits, columns, own = _against_all(z, keys, offset, temperature)
    positives = logits.gather(1, columns) * weights.movedim(2, 1).flatten(0, 1)
    negatives = logits.scatter(1, columns, float("-inf"))
    return (negatives.logsumexp(1) - positives[~own].view(len(logits), -1).mean(1)).mean()


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
    logits = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).T / temperature
    return F.cross_entropy(logits, offset + torch.arange(len(queries), device=queries.device))


def queue_info_nce(q: torch.Tensor, k: torch.Tensor, queue: torch.Tensor, temperature: float) -> torch.Tensor:
    """InfoNCE of MoCo (He et al., 2020, equation 1): each query (b, D) against its key (b, D) and a ``queue`` (K, D) of
    keys of length 1, which are all negatives; the mean over queries, a scalar."""
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    logits = torch.cat([(q * k).sum(-1, keepdim=True), q @ queue.T], dim=1) / temperature
    return (logits.logsumexp(1) - logits[:, 0]).mean()
