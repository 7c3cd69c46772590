"""The weighted k-nearest-neighbour classifier of Wu et al., "Unsupervised feature learning via non-parametric
instance discrimination", 2018, section 3.4."""

import torch
import torch.nn.functional as F

from sharding.command import UserError
from train.evaluate.features import Features

_CHUNK = 1024


def knn_predict(train: Features, test: Features, *, k: int = 20, temperature: float = 0.07) -> torch.Tensor:
    """Predicted labels (n,) of the test representations.

    Each of the ``k`` training neighbours of highest cosine similarity s votes for its class with exp(s / temperature).
    """
    if not 1 <= k <= len(train):
        raise UserError(f"k: expected 1 to {len(train)} neighbours (the training set's size), found {k}")
    keys = F.normalize(train.h, dim=1)
    num_classes = int(train.labels.max()) + 1
    predictions = []
    for queries in F.normalize(test.h, dim=1).split(_CHUNK):
        similarity, neighbours = (queries @ keys.T).topk(k, dim=1)
        votes = torch.zeros(len(queries), num_classes, device=queries.device)
        votes.scatter_add_(1, train.labels[neighbours], (similarity / temperature).exp())
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def accuracy(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of equal entries, percent."""
    return 100 * (predicted == labels).float().mean().item()
