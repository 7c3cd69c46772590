import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score

from tests.processes import run_ranks
from tests.train.evaluate.test_knn import clusters
from train.evaluate import cluster
from train.evaluate.cluster import Cluster, assign, lloyd, plus_plus, points_of
from train.evaluate.features import Features
from train.processes.distributed import World

NOTHING = (None, None)  # k-means looks at representations alone


def found_by(protocol: Cluster, test: Features, world: World = World()) -> dict[str, float]:  # noqa: B008
    return protocol.together(*NOTHING, test, world)  # type: ignore[arg-type]


def test_clusters_that_are_the_classes_score_full() -> None:
    expected = {"NMI %": 100, "ARI %": 100, "matched accuracy %": 100, "silhouette": 1}
    assert found_by(Cluster(), clusters(200, 0, spread=0.01)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("count", [2, 5, 40])
def test_from_the_same_centres_it_ends_where_scikit_learn_does(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_TILE", 64)
    features = clusters(300, 0, spread=1.5)
    h = torch.nn.functional.normalize(features.h.double(), dim=1)
    x, seeds = points_of(features, World()), h[torch.linspace(0, 299, count).long()]
    reference = KMeans(count, init=seeds.numpy(), n_init=1, max_iter=1000, tol=0, algorithm="lloyd").fit(h.numpy())
    explained, centres = lloyd(x, seeds, 1000, World())
    assert assign(x, centres).tolist() == reference.labels_.tolist()
    np.testing.assert_allclose(centres, reference.cluster_centers_, atol=1e-8)
    assert 300 - explained == pytest.approx(reference.inertia_, abs=1e-5)


def test_iterations_end_it_where_it_is() -> None:
    features, world = clusters(300, 0, spread=1.5), World()
    x = points_of(features, world)
    explained = [lloyd(x, x[:7, :-1], iterations, world)[0] for iterations in (1, 2, 3, 1000)]
    assert explained == sorted(set(explained)), "each explains more"


def test_a_centre_without_points_stays_where_it_is() -> None:
    x, far = points_of(clusters(100, 0), World()), torch.full((1, 12), 9.0, dtype=torch.float64)
    _, centres = lloyd(x, torch.cat([x[:2, :-1], far]), 100, World())
    assert torch.equal(centres[2:], far)
    assert assign(x, centres).unique().tolist() == [0, 1]


def test_seeds_are_drawn_by_squared_distance() -> None:
    """Three images on a circle, by 90 and 60 degrees: squared distances 2, 1 and, between the outer ones, 3.73."""
    angles = torch.tensor([0.0, 90.0, 150.0]).deg2rad()
    h = torch.stack([angles.cos(), angles.sin()], dim=1)
    x = points_of(Features(h, torch.arange(3), torch.arange(3)), World())
    generator = torch.Generator().manual_seed(0)
    pairs = torch.stack([plus_plus(x, 3, 2, generator, World()) for _ in range(3000)])
    drawn = (pairs[:, :, None] - x[:, :-1]).abs().sum(-1).argmin(-1)  # (3000, 2)
    first = drawn[:, 0].bincount() / 3000
    second = drawn[drawn[:, 0] == 0, 1].bincount(minlength=3) / (drawn[:, 0] == 0).sum()
    torch.testing.assert_close(first, torch.full((3,), 1 / 3), atol=0.03, rtol=0)
    torch.testing.assert_close(second, torch.tensor([0, 2, 3.732]) / 5.732, atol=0.04, rtol=0)


def test_of_several_starts_that_of_least_inertia_counts() -> None:
    features, world, generator = clusters(200, 0, spread=1.5), World(), torch.Generator().manual_seed(3)
    x = points_of(features, world)
    ends = [lloyd(x, plus_plus(x, 200, 7, generator, world), 100, world) for _ in range(4)]
    explained = [end[0] for end in ends]
    assert 0 < explained.index(max(explained)) < 3
    found = found_by(Cluster(starts=4, seed=3), features)
    assert found == cluster.scores(features, assign(x, max(ends)[1]), seed=3)


def by_rank(world: World) -> list[torch.Tensor | float]:
    """Centres to the bit, from tiles of which the last is short, and by more ranks than tiles."""
    made: list[torch.Tensor | float] = []
    for cluster._TILE in (64, 1000):
        test = clusters(300, 0, spread=1.5)
        x, generator = points_of(test, world), torch.Generator().manual_seed(0)
        seeds = plus_plus(x, 300, 5, generator, world)
        made += [seeds, lloyd(x, seeds, 100, world)[1], *found_by(Cluster(clusters=5, starts=2), test, world).values()]
    return made


def test_several_processes_find_what_one_finds_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_TILE", cluster._TILE)
    expected, (first, *others) = by_rank(World()), run_ranks(by_rank, 3)
    assert len(first) == len(expected) == 12
    for ours, alone in zip(first, expected, strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(alone))
    assert [len(other) for other in others] == [4, 4], "rank 0 alone has scores"


def test_scores_are_those_of_scikit_learn() -> None:
    features = clusters(200, 0, spread=1.5)
    h = torch.nn.functional.normalize(features.h, dim=1).numpy()
    assigned = KMeans(5, n_init=3, random_state=1).fit_predict(h)
    found = cluster.scores(features, torch.from_numpy(assigned), seed=1)
    assert found["silhouette"] == pytest.approx(float(silhouette_score(h, assigned)), abs=1e-5)
    labels = features.labels.numpy()
    assert found["NMI %"] == pytest.approx(100 * normalized_mutual_info_score(labels, assigned))
    assert found["ARI %"] == pytest.approx(100 * adjusted_rand_score(labels, assigned))
    counts = sorted((np.sum((labels == c) & (assigned == k)) for c in range(7) for k in range(5)), reverse=True)
    assert 100 * counts[0] / 200 <= found["matched accuracy %"] <= 100 * sum(counts[:5]) / 200


def test_more_clusters_than_images_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"cluster\.clusters: expected at most the 5 test images, found 6"):
        found_by(Cluster(clusters=6), clusters(5, 1))
