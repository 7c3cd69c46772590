"""Clusters of the test images' representations, without labels, held against the classes: k-means on the unit sphere
(scikit-learn's, k-means++, the best of several starts), as many clusters as classes unless said otherwise."""

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score
from sklearn.metrics.cluster import contingency_matrix

from sharding.command import UserError
from train.evaluate import Protocol, Values
from train.evaluate.features import Features

_SILHOUETTE_IMAGES = 10_000  # drawn at random where there are more: it compares all pairs


class Cluster(Protocol):
    clusters: int | None = Field(None, ge=2, description="default: the number of classes")
    starts: int = Field(3, ge=1, description="the one of least inertia counts")
    seed: int = Field(0, ge=0, description="of k-means++")

    def check(self, num_train: int, num_test: int) -> None:
        if self.clusters and self.clusters > num_test:
            raise UserError(f"cluster.clusters: expected at most the {num_test} test images, found {self.clusters}")

    def __call__(self, train: Features, test: Features, device: torch.device) -> Values:
        h = torch.cat([F.normalize(tile.to(device), dim=1).cpu() for tile, _ in test.tiles(device)]).numpy()
        labels = test.labels.numpy()
        count = self.clusters or len(np.unique(labels))
        self.check(len(train), len(test))  # undecodable ones are left out by now
        found = KMeans(count, n_init=self.starts, random_state=self.seed).fit_predict(h)
        table = contingency_matrix(labels, found)
        matched = table[linear_sum_assignment(table, maximize=True)].sum()
        yield "NMI %", 100 * float(normalized_mutual_info_score(labels, found))
        yield "ARI %", 100 * float(adjusted_rand_score(labels, found))
        yield "matched accuracy %", 100 * float(matched / table.sum())
        if count < (size := min(len(test), _SILHOUETTE_IMAGES)):
            yield "silhouette", float(silhouette_score(h, found, sample_size=size, random_state=self.seed))
