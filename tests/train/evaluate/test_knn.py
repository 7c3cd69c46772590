import runpy
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from sharding.manifest import ShardSet
from train.evaluate import features
from train.evaluate.features import Features
from train.evaluate.knn import KNN, Retrieve, nearest, votes
from train.evaluate.pictures import Album

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


def ranked(train: Features, test: Features, k: int, temperature: float) -> torch.Tensor:
    """Classes (n, 7) of the test images by votes, those with most first."""
    similarity, neighbours = nearest(test, train, k, CPU)
    return votes(similarity, train.labels[neighbours], 7, temperature).argsort(dim=1, descending=True)


@pytest.mark.parametrize("k", [10, 20, 100, 200])
def test_predictions_are_those_of_dinos_eval_knn(k: int) -> None:
    """As its `knn_classifier` computes them, with its lists of k and its temperature."""
    train, test = clusters(300, 0, 1.5), clusters(100, 1, 1.5)
    similarity = torch.nn.functional.normalize(test.h, dim=1) @ torch.nn.functional.normalize(train.h, dim=1).T
    distances, indices = similarity.sort(dim=1, descending=True)
    one_hot = torch.nn.functional.one_hot(train.labels[indices[:, :k]], 7)  # (n, k, C)
    scores = (one_hot * (distances[:, :k, None] / 0.07).exp()).sum(1)
    predicted = scores.argsort(dim=1, descending=True)
    voted = scores.sort(dim=1, descending=True).values > 0  # DINO ranks the rest by number, and counts them
    assert torch.equal(ranked(train, test, k, 0.07)[voted], predicted[voted])
    found, right = dict(KNN(preset="dinov3")(train, test, CPU)), (predicted == test.labels[:, None]) & voted
    for top in (1, 5):
        expected = 100 * right[:, :top].any(1).double().mean().item()
        assert found[f"k={k} T=0.07 top-{top} %"] == pytest.approx(expected)
    assert 0 < found[f"k={k} T=0.07 top-1 %"] < 100


@pytest.mark.parametrize("k", [20, 200])
def test_predictions_are_those_of_lightly(k: int) -> None:
    lightly = find_spec("lightly")
    if lightly is None or not lightly.origin:
        pytest.skip("lightly is not installed")
    # The file alone: the package around it wants pytorch_lightning.
    module = runpy.run_path(str(Path(lightly.origin).parent / "utils" / "benchmarking" / "knn.py"))
    train, test = clusters(300, 0, 1.5), clusters(100, 1, 1.5)
    keys, queries = (torch.nn.functional.normalize(features.h, dim=1) for features in (train, test))
    predicted = module["knn_predict"](queries, keys.T, train.labels, num_classes=7, knn_k=k, knn_t=0.1)
    assert torch.equal(ranked(train, test, k, 0.1)[:, 0], predicted[:, 0])
    found = dict(KNN(preset="lightly", k=k)(train, test, CPU))
    assert found[f"k={k} T=0.1 top-1 %"] == pytest.approx(100 * (predicted[:, 0] == test.labels).double().mean().item())


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


def test_a_sheet_has_a_frame_around_neighbours_of_the_same_class(shard_set: ShardSet, tmp_path: Path) -> None:
    """Images beside each other on a circle: the nearest of one are those with numbers next to its own."""
    angles = 2 * torch.pi * torch.arange(92) / 92
    h = torch.stack([angles.cos(), angles.sin()], dim=1)
    framed, width = [], []
    for labels in (torch.zeros(92), torch.arange(92), torch.arange(92) // 46):
        test = Features(h, torch.arange(92), labels.long())
        made = Album(tmp_path, "pretrained", 0, shard_set, {"num_threads": 1})
        assert Retrieve(sheet=3).draw(test, made, CPU) == {}
        with Image.open(made.folder / "neighbours.png") as picture:
            width.append(picture.width)
            framed.append(int((np.asarray(picture.convert("RGB")) == (0, 158, 115)).all(-1).sum()))
    assert framed[0] > 20 * 1000
    assert framed[1] == 0
    # Images 0, 45 and 91 have half of their neighbours, 5 of 10, in their own half; with the tie at the ends.
    assert framed[2] == pytest.approx(framed[0] / 2, rel=0.15)
