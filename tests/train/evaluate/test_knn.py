import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from train.evaluate.features import Features
from train.evaluate.knn import accuracy, knn_predict


def clusters(n: int, seed: int, spread: float = 0.8) -> Features:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(5, 12, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(5, (n,), generator=generator)
    return Features(centers[labels] + spread * torch.randn(n, 12, generator=generator), labels)


@pytest.mark.parametrize("k", [1, 7])
def test_agrees_with_scikit_learn(k: int) -> None:
    train, test = clusters(300, 0), clusters(100, 1)

    def votes(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / 0.07)

    reference = KNeighborsClassifier(n_neighbors=k, metric="cosine", weights=votes).fit(train.h, train.labels)
    predicted = knn_predict(train, test, k=k)
    assert (predicted.numpy() == reference.predict(test.h)).all()
    assert accuracy(predicted, test.labels) == pytest.approx(100 * reference.score(test.h, test.labels))


def test_too_many_neighbours_is_an_error() -> None:
    with pytest.raises(ValueError, match="k: expected 1 to 10"):
        knn_predict(clusters(10, 0), clusters(5, 1), k=11)
