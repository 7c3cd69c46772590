"""Losses that tell the views of an image from those of other images."""

import torch
import torch.nn.functional as F


def nt_xent(z: torch.Tensor, keys: torch.Tensor, offset: int, temperature: float) -> torch.Tensor:
    """The normalised temperature-scaled cross entropy of SimCLR (Chen et al., 2020, equation 1).

    z       (V, b, D) embeddings of V views of the b anchor images
    keys    (V, B, D) embeddings of the whole batch, in which the anchors are rows ``offset`` to ``offset + b``

    For each anchor and each of its V - 1 positives, the cross entropy of the positive against all other embeddings
    but the anchor itself; the mean over anchors and positives, a scalar. For V = 2 this is the paper's loss.
    """
    num_views, num_anchors, _ = z.shape
    anchors = F.normalize(z, dim=-1).flatten(0, 1)
    others = F.normalize(keys, dim=-1).flatten(0, 1)
    logits = anchors @ others.T / temperature  # (V * b, V * B)
    rows = torch.arange(num_views * num_anchors, device=z.device)
    images = offset + rows % num_anchors
    columns = images[:, None] + keys.shape[1] * torch.arange(num_views, device=z.device)  # (V * b, V)
    own = F.one_hot(rows // num_anchors, num_views).bool()
    positives = logits.gather(1, columns)
    logits = logits.scatter(1, columns[own][:, None], float("-inf"))
    return (logits.logsumexp(1) - positives[~own].view(len(rows), -1).mean(1)).mean()


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
