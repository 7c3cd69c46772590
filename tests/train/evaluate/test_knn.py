import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from train.evaluate import features
from train.evaluate.features import Features
from train.evaluate.knn import KNN, Retrieve, nearest

CPU = torch.device("cpu")


def clusters(n: int, seed: int, spread: float = 0.8, num_classes: int = 7) -> Features:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(num_classes, 12, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(num_classes, (n,), generator=generator)
    return Features(centers[labels] + spread * torch.randn(n, 12, generator=generator), torch.arange(n), labels)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that several meet."""
    monkeypatch.setattr(features.Features.tiles, "__defaults__", (64,))


@pytest.mark.parametrize("k", [1, 7, 150])
def test_votes_are_those_of_scikit_learn(k: int) -> None:
    train, test = clusters(300, 0, 1.5), clusters(100, 1, 1.5)

    def votes(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / 0.07)

    reference = KNeighborsClassifier(n_neighbors=k, metric="cosine", weights=votes).fit(train.h, train.labels)
    found = dict(KNN(k=(k, 2))(train, test, CPU))
    assert found[f"k={k} T=0.07 top-1 %"] == pytest.approx(100 * reference.score(test.h, test.labels))
    if k == 150:  # few neighbours leave classes without a vote, which scikit-learn ranks by number
        expected = top_k_accuracy_score(test.labels, reference.predict_proba(test.h), k=5)
        assert found["k=150 T=0.07 top-5 %"] == pytest.approx(100 * expected)
    assert 0 < found["k=2 T=0.07 top-1 %"] < found["k=2 T=0.07 top-5 %"] < 100


def test_neighbours_are_exact_whatever_the_tiles() -> None:
    train, test = clusters(300, 0), clusters(100, 1)
    distances, expected = NearestNeighbors(n_neighbors=70, metric="cosine").fit(train.h).kneighbors(test.h)
    similarity, found = nearest(test, train, 70, CPU)
    assert (found.numpy() == expected).mean() > 0.999  # ties within rounding
    torch.testing.assert_close(similarity, torch.from_numpy(1 - distances).float())


def test_recall_counts_other_images_only() -> None:
    test = clusters(90, 1, 1.5)
    twice = Features(torch.cat([test.h, test.h]), torch.arange(180), torch.cat([test.labels, test.labels]))
    assert dict(Retrieve(k=(1,))(twice, twice, CPU)) == {"recall@1 %": 100}, "each image has its copy"
    similarity = torch.nn.functional.normalize(test.h, dim=1) @ torch.nn.functional.normalize(test.h, dim=1).T
    order = similarity.fill_diagonal_(-2).argsort(dim=1, descending=True)
    found = dict(Retrieve(k=(1, 4))(test, test, CPU))
    for k in (1, 4):
        hits = (test.labels[order[:, :k]] == test.labels[:, None]).any(1)
        assert found[f"recall@{k} %"] == pytest.approx(100 * hits.double().mean().item())


def test_too_many_neighbours_are_an_error() -> None:
    with pytest.raises(ValueError, match="k: expected at most 10"):
        list(KNN(k=11)(clusters(10, 0), clusters(5, 1), CPU))


def test_presets_are_those_of_the_papers_and_can_be_changed() -> None:
    assert KNN(preset="dinov3").k == (10, 20, 100, 200)
    lightly = KNN(preset="lightly", k=20)
    assert (lightly.k, lightly.temperature) == ((20,), (0.1,))
