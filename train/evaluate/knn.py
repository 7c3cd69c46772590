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
    check_neighbours(k, len(train))
    keys = F.normalize(train.h, dim=1)
    num_classes = int(train.labels.max()) + 1
    predictions = []
    for queries in F.normalize(test.h, dim=1).split(_CHUNK):
        similarity, neighbours = (queries @ keys.T).topk(k, dim=1)
        votes = torch.zeros(len(queries), num_classes, device=queries.device)
        weights = ((similarity - similarity[:, :1]) / temperature).exp()  # the nearest counts 1: nothing overflows
        votes.scatter_add_(1, train.labels[neighbours], weights)
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def check_neighbours(k: int, num_train: int) -> None:
    """Raises `UserError` unless there are ``k`` training images."""
    if not 1 <= k <= num_train:
        raise UserError(f"k: expected 1 to {num_train} neighbours (the training set's size), found {k}")


def accuracy(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of equal entries, percent."""
    return 100 * (predicted == labels).float().mean().item()
