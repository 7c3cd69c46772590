"""Losses that compare assignments of views to prototypes."""

import torch
import torch.nn.functional as F


def sinkhorn(scores: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    """Codes: soft assignments that use all prototypes equally (Caron et al., SwAV, 2020, equation 3; Cuturi, 2013).

    scores  (B, K) similarities of B embeddings, of the whole batch, to K prototypes

    ``exp(scores / epsilon)``, its columns and then its rows scaled to equal sums, alternately; in logarithms, so that
    no ``epsilon`` overflows. Returns codes (B, K): rows are distributions over prototypes, and columns sum to B / K as
    far as the iterations came.
    """
    logits = scores / epsilon
    for _ in range(iterations):
        logits = logits.log_softmax(0).log_softmax(1)
    return logits.exp()


def swapped_prediction(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The cross entropy of each view's prediction against the targets of other views (SwAV, eq. 1; DINO, eq. 3).

    logits   (V, b, K) of V views of b images
    targets  (T, b, K) distributions of the first T of these views, without gradient

    The mean over images and over all T (V - 1) pairs of a target and a different view, a scalar.
    """
    predictions = F.log_softmax(logits, dim=-1)
    pairs = [(t, v) for t in range(len(targets)) for v in range(len(logits)) if v != t]
    return -torch.stack([torch.linalg.vecdot(targets[t], predictions[v]).mean() for t, v in pairs]).mean()


def entropy(distributions: torch.Tensor) -> torch.Tensor:
    """Shannon's entropy of distributions (..., K), in nats, (...)."""
    return torch.special.entr(distributions).sum(-1)
