"""Clusters of the test images' representations, without labels, held against the classes: k-means on the unit sphere
(Lloyd, from k-means++, the best of several starts), as many clusters as classes unless said otherwise. Each process has
a share of the images. Sums over images are exact, so that no bit depends on their order."""

from operator import itemgetter

import torch
import torch.nn.functional as F
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score
from sklearn.metrics.cluster import contingency_matrix

from sharding.command import UserError
from sharding.progress import steps
from train.engine.checkpoint import Pretrained
from train.evaluate import Protocol
from train.evaluate.data import Images
from train.evaluate.features import Features, share
from train.processes.distributed import World

_SILHOUETTE_IMAGES = 10_000  # drawn at random where there are more: it compares all pairs
_TILE = 1024  # images whose distances to all centres are in memory at a time
_STEPS = 2**30  # to 1, of coordinates: float64 sums whole steps of 8 million images without rounding


class Cluster(Protocol):
    clusters: int | None = Field(None, ge=2, description="default: the number of classes")
    starts: int = Field(3, ge=1, description="the one of least inertia counts")
    iterations: int = Field(100, ge=1, description="of Lloyd's algorithm in a start, at most")
    seed: int = Field(0, ge=0, lt=2**63, description="of k-means++")

    def check(self, num_train: int, num_test: int) -> None:
        if self.clusters and self.clusters > num_test:
            raise UserError(f"cluster.clusters: expected at most the {num_test} test images, found {self.clusters}")

    def together(self, pretrained: Pretrained, images: Images, test: Features, world: World) -> dict[str, float]:
        count, generator = self.clusters or len(test.labels.unique()), torch.Generator().manual_seed(self.seed)
        self.check(0, len(test))  # undecodable ones are left out by now
        x, best = points_of(test, world), (-1.0, torch.empty(0))
        for _ in steps(range(self.starts), "k-means", shown=world.is_main):
            seeds = plus_plus(x, len(test), count, generator, world)
            best = max(best, lloyd(x, seeds, self.iterations, world), key=itemgetter(0))
        found = world.collect(assign(x, best[1]).cpu())
        return scores(test, torch.cat(found), self.seed) if found else {}


def points_of(test: Features, world: World) -> torch.Tensor:
    """This rank's share (n, D + 1) of the images on the unit sphere, float64, in whole steps, and a column of ones."""
    part = test.take(torch.arange(len(test))[share(len(test), _TILE, world)])
    tiles = (F.normalize(tile.double(), dim=1) for tile, _ in part.tiles(world.device))
    return torch.cat([F.pad((tile * _STEPS).round() / _STEPS, (0, 1), value=1.0) for tile in tiles])


def plus_plus(x: torch.Tensor, total: int, count: int, generator: torch.Generator, world: World) -> torch.Tensor:
    """k-means++ (Arthur and Vassilvitskii, 2007): centres (count, D) among the ``total`` points of all ranks, each with
    a probability proportional to the squared distance from the nearest before it. Such a draw is a race: a point
    arrives after a time of exponential distribution with that rate (Efraimidis and Spirakis, 2006)."""
    own, distances, centres = share(total, _TILE, world), x.new_full((len(x),), 4.0), list[torch.Tensor]()
    while len(centres) < count:
        times = -torch.rand(total, dtype=torch.float64, generator=generator).log()[own].to(x) / distances
        first = (times.min().item(), x[times.argmin(), :-1].cpu()) if len(x) else (torch.inf, x)
        centres.append(min(world.gather_objects(first), key=itemgetter(0))[1].to(x))
        tiles = [(tile[:, :-1] - centres[-1]).square().sum(1) for tile in x.split(_TILE)]
        distances = torch.minimum(distances, torch.cat(tiles))
    return torch.stack(centres)


def lloyd(x: torch.Tensor, centres: torch.Tensor, iterations: int, world: World) -> tuple[float, torch.Tensor]:
    """Lloyd's algorithm on the points of all ranks, from ``centres`` (k, D), until nothing changes: the sum of squares
    that they explain, which is all but the inertia, and the new centres. One without points stays where it is."""
    sums = F.pad(torch.zeros_like(centres), (0, 1))  # the last column counts
    for _ in range(iterations):
        before, sums = sums, world.total(torch.zeros_like(sums).index_add_(0, assign(x, centres), x))
        if torch.equal(sums, before):
            break
        centres = torch.where(sums[:, -1:] > 0, sums[:, :-1] / sums[:, -1:], centres)
    return (sums[:, -1:] * centres.square()).sum().item(), centres


def assign(x: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """The nearest centre (n,) of each of this rank's points: least ``|c|^2 / 2 - x c``."""
    weights = torch.cat([centres, -centres.square().sum(1, keepdim=True) / 2], dim=1)
    return torch.cat([(tile @ weights.T).argmax(1) for tile in x.split(_TILE)])


def scores(test: Features, found: torch.Tensor, seed: int) -> dict[str, float]:
    """How the clusters ``found`` (n,) agree with the classes, and how far apart they are."""
    table = contingency_matrix(test.labels, found)
    values = {
        "NMI %": 100 * float(normalized_mutual_info_score(test.labels, found)),
        "ARI %": 100 * float(adjusted_rand_score(test.labels, found)),
        "matched accuracy %": 100 * float(table[linear_sum_assignment(table, maximize=True)].sum() / table.sum()),
    }
    chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))[:_SILHOUETTE_IMAGES]
    if 1 < len(found[chosen].unique()) < len(chosen):
        ((h, _),) = test.take(chosen).tiles(torch.device("cpu"), len(chosen))
        values["silhouette"] = float(silhouette_score(F.normalize(h, dim=1), found[chosen]))
    return values
