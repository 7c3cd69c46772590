"""Pieces must give the gradient of the undivided batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.processes import run_ranks
from train.engine.gradcache import Piece, accumulate, grad_cache
from train.methods import Loss, Method
from train.methods.networks import Embeddings
from train.methods.simclr import SimCLR, SimCLRConfig
from train.model.draws import Draws
from train.model.heads import MLP
from train.processes.distributed import World

_BATCH = 12


class Encoder(nn.Module):
    """Without BatchNorm, so that images stay apart in it."""

    num_features = 24

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 3), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


class Dropping(SimCLR):
    """SimCLR without BatchNorm that drops features by its draws."""

    def __init__(self, world: World) -> None:
        super().__init__(SimCLRConfig(), Encoder(), world)  # type: ignore[arg-type]
        self.projector = MLP(nn.Linear(24, 8))

    def forward(self, views: list[torch.Tensor], draws: Draws) -> Embeddings:
        e = super().forward(views, draws)
        kept = torch.stack([draws.uniform(f"keep.{v}", 8) < 0.8 for v in range(len(views))])
        return Embeddings(e.z * kept, e.z * kept)


class Separate(Dropping):
    images_meet = False

    def loss(self, e: Embeddings, labels: torch.Tensor | None = None, draws: Draws | None = None) -> Loss:
        value = (e.z[0] - e.z[1]).square().sum(-1).mean() - (e.z[0] * e.z[1]).sin().sum(-1).mean()
        return Loss(value, {"size": e.z.detach().square().mean()})


def batch(world: World) -> Piece:
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(_BATCH, 3, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2)]
    ids, per_rank = torch.arange(100, 100 + _BATCH), _BATCH // world.size
    rows = slice(world.rank * per_rank, (world.rank + 1) * per_rank)
    return Piece([view[rows] for view in views], Draws(0, 5, ids[rows]), None)


def gradients(world: World, kind: type[Dropping], by: Callable[..., Any], size: int) -> list[Any]:
    torch.manual_seed(0)
    method: Method = kind(world).double()
    wrapped: Any = world.wrap(method)
    loss = by(method, wrapped, getattr(wrapped, "no_sync", torch.enable_grad), batch(world), size)[0]
    metrics = [world.mean(value) for _, value in sorted(loss.metrics.items())]
    return [world.mean(loss.value), *metrics, *(p.grad for p in method.parameters())]


@pytest.mark.parametrize(("kind", "by"), [(Dropping, grad_cache), (Separate, accumulate), (Separate, grad_cache)])
@pytest.mark.parametrize("size", [1, 3, 6])
def test_pieces_have_the_gradient_of_the_whole(kind: type[Dropping], by: Callable[..., Any], size: int) -> None:
    expected = gradients(World(), kind, accumulate, _BATCH)
    for found, wanted in zip(gradients(World(), kind, by, size), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("kind", "by"), [(Dropping, grad_cache), (Separate, accumulate)])
def test_pieces_of_two_processes_as_well(kind: type[Dropping], by: Callable[..., Any]) -> None:
    expected = gradients(World(), kind, accumulate, _BATCH)
    for rank in run_ranks(gradients, 2, kind, by, 3):
        for found, wanted in zip(rank, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_accumulating_where_images_meet_would_be_wrong() -> None:
    whole, parts = (gradients(World(), Dropping, accumulate, size)[-1] for size in (_BATCH, 3))
    assert not torch.allclose(whole, parts, rtol=0.1)


def test_running_statistics_are_updated_once_a_piece() -> None:
    torch.manual_seed(0)
    method = Dropping(World()).double()
    method.projector = MLP(nn.BatchNorm1d(24), nn.Linear(24, 8)).double()
    grad_cache(method, method, torch.enable_grad, batch(World()), 4)
    assert method.projector[0].num_batches_tracked == 3
