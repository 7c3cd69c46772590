"""The weighted k-nearest-neighbour classifier of Wu et al., "Unsupervised feature learning via non-parametric
instance discrimination", 2018, section 3.4: each of the k training images of highest cosine similarity s votes for its
class with exp(s / temperature)."""

from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator

from sharding.command import UserError
from sharding.progress import steps
from train.evaluate import Counts, Protocol, Rates, Values
from train.evaluate.features import TILE, Features
from train.evaluate.pictures import NEIGHBOURS, Album, save_sheet

_PRESETS: dict[str, dict[str, Any]] = {
    "wu": {"k": (200,), "temperature": (0.07,)},
    "lightly": {"k": (200,), "temperature": (0.1,)},  # lightly-ai/lightly, benchmarks/imagenet
    "dinov3": {"k": (10, 20, 100, 200), "temperature": (0.07,)},  # facebookresearch/dinov3, eval
}


class KNN(Protocol):
    preset: Literal["wu", "lightly", "dinov3"] | None = Field(None, description="k and temperature of a published one")
    k: Counts = Field((20,), description="neighbours, one number or several")
    temperature: Rates = Field((0.07,), description="of the votes, one number or several")

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, given: dict[str, Any]) -> dict[str, Any]:
        return _PRESETS.get(str(given.get("preset")), {}) | given

    def check(self, num_train: int, num_test: int) -> None:
        _check_neighbours("knn.k", max(self.k), num_train)

    def __call__(self, train: Features, test: Features, device: torch.device) -> Values:
        similarity, neighbours = nearest(test, train, max(self.k), device)
        classes, num_classes = train.labels[neighbours], int(train.labels.max()) + 1
        for k, temperature in product(self.k, self.temperature):
            most, best = votes(similarity[:, :k], classes[:, :k], num_classes, temperature).topk(min(5, num_classes))
            correct = (best == test.labels[:, None]) & (most > 0)
            for count in (1, 5) if num_classes > 5 else (1,):
                share = correct[:, :count].any(1).double().mean().item()
                yield f"k={k} T={temperature:g} top-{count} %", 100 * share


class Retrieve(Protocol):
    """recall@k: the share of test images that have one of their class among the k nearest other test images (Oh Song et
    al., "Deep metric learning via lifted structured feature embedding", 2016)."""

    k: Counts = Field((1, 5, 10), description="neighbours, one number or several")
    sheet: int = Field(10, ge=0, le=100, description="test images shown with their 10 nearest; 0: no picture")

    def check(self, num_train: int, num_test: int) -> None:
        _check_neighbours("retrieve.k", max(self.k), num_test - 1)

    def __call__(self, train: Features, test: Features, device: torch.device) -> Values:
        _, found = nearest(test, test, max(self.k) + 1, device)
        others = found != torch.arange(len(test))[:, None]  # an image finds itself, as a rule first
        right = others & (test.labels[found] == test.labels[:, None])
        for k in self.k:
            yield f"recall@{k} %", 100 * (right & (others.cumsum(1) <= k)).any(1).double().mean().item()

    def draw(self, test: Features, album: Album, device: torch.device) -> dict[str, float]:
        """`NEIGHBOURS`: in each row a test image and its nearest others, those of its class in a frame."""
        rows = torch.linspace(0, len(test) - 1, min(self.sheet, len(test))).long()
        if len(rows):
            _, found = nearest(test.take(rows), test, min(11, len(test)), device)
            others = [near[near != row][: found.shape[1] - 1] for near, row in zip(found, rows, strict=True)]
            shown = torch.cat([rows[:, None], torch.stack(others)], dim=1)
            same = test.labels[shown] == test.labels[rows, None]
            same[:, 0] = False
            tiles = album.thumbnails(test.ids[shown.flatten()], 96).reshape(*shown.shape, 96, 96, 3)
            save_sheet(album.file(NEIGHBOURS), tiles, same.numpy(), album.classes(test.labels[rows]))
        return {}


def votes(similarity: torch.Tensor, classes: torch.Tensor, num_classes: int, temperature: float) -> torch.Tensor:
    """Votes (n, C) of neighbours (n, k), the nearest first."""
    weights = ((similarity - similarity[:, :1]) / temperature).exp()  # the nearest counts 1: nothing overflows
    return weights.new_zeros(len(weights), num_classes).scatter_add_(1, classes, weights)


def nearest(queries: Features, keys: Features, k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine similarities (n, k) of the ``k`` nearest keys of each query, and their positions (n, k), nearest first.
    Exact; a tile of the queries meets a tile of the keys at a time. Raises `UserError` where there are fewer keys."""
    _check_neighbours("k", k, len(keys))
    tiles = steps(queries.tiles(device), "neighbours", -(-len(queries) // TILE))
    found = [_nearest_of(F.normalize(tile, dim=1), keys, k) for tile, _ in tiles]
    similarity, positions = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
    return similarity, positions


def _check_neighbours(name: str, k: int, num_images: int) -> None:
    if k > num_images:
        raise UserError(f"{name}: expected at most {num_images} neighbours, as many as there are images, found {k}")


def _nearest_of(queries: torch.Tensor, keys: Features, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    similarity = queries.new_zeros(len(queries), 0)
    positions = similarity.long()
    start = 0
    for tile, _ in keys.tiles(queries.device):
        here = torch.arange(start, start + len(tile), device=queries.device).expand(len(queries), -1)
        similarity = torch.cat([similarity, queries @ F.normalize(tile, dim=1).T], dim=1)
        similarity, order = similarity.topk(min(k, similarity.shape[1]), dim=1)
        positions = torch.cat([positions, here], dim=1).gather(1, order)
        start += len(tile)
    return similarity, positions
