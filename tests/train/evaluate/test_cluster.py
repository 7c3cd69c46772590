import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score

from tests.train.evaluate.test_knn import CPU, clusters
from train.evaluate.cluster import Cluster


def test_clusters_that_are_the_classes_score_full() -> None:
    features = clusters(200, 0, spread=0.01)
    expected = {"NMI %": 100, "ARI %": 100, "matched accuracy %": 100, "silhouette": 1}
    assert dict(Cluster()(features, features, CPU)) == pytest.approx(expected, rel=0.02)


def test_scores_are_those_of_scikit_learn() -> None:
    features = clusters(200, 0, spread=1.5)
    h = torch.nn.functional.normalize(features.h, dim=1).numpy()
    assigned = KMeans(5, n_init=3, random_state=1).fit_predict(h)
    found = dict(Cluster(clusters=5, seed=1)(features, features, CPU))
    assert found["silhouette"] == pytest.approx(float(silhouette_score(h, assigned)), abs=1e-5)
    labels = features.labels.numpy()
    assert found["NMI %"] == pytest.approx(100 * normalized_mutual_info_score(labels, assigned))
    assert found["ARI %"] == pytest.approx(100 * adjusted_rand_score(labels, assigned))
    counts = sorted((np.sum((labels == c) & (assigned == k)) for c in range(7) for k in range(5)), reverse=True)
    assert 100 * counts[0] / 200 <= found["matched accuracy %"] <= 100 * sum(counts[:5]) / 200


def test_more_clusters_than_images_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"cluster\.clusters: expected at most the 5 test images, found 6"):
        list(Cluster(clusters=6)(clusters(9, 0), clusters(5, 1), CPU))
