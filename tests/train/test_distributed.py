"""N processes must give the single process's gradient of the global batch."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.processes import run_ranks
from train.batchnorm import synchronize_batchnorm
from train.distributed import World
from train.losses.contrastive import nt_xent

_BATCH = 12


def images() -> torch.Tensor:
    return torch.randn(2, _BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 16), nn.BatchNorm1d(16)
    )


def contrastive_gradients(world: World) -> list[torch.Tensor]:
    module = synchronize_batchnorm(network(), world)
    wrapped = world.wrap(module)
    per_rank = _BATCH // world.size
    local = images()[:, world.rank * per_rank : (world.rank + 1) * per_rank]
    z = wrapped(local.flatten(0, 1)).view(2, per_rank, -1)
    keys = world.gather(z.transpose(0, 1)).transpose(0, 1)
    nt_xent(z, keys, world.rank * per_rank, 0.1).backward()
    buffers = [buffer.float() for buffer in module.buffers()]
    return [p.grad for p in module.parameters() if p.grad is not None] + buffers


def gathered_ranks(world: World) -> list[Any]:
    rows = world.gather(torch.full((2, 1), float(world.rank)))
    return [rows, world.mean(torch.tensor(float(world.rank))), world.any(world.rank == 1), world.any(False)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_and_statistics_are_those_of_one_process(world_size: int) -> None:
    expected = contrastive_gradients(World())
    for found in run_ranks(contrastive_gradients, world_size):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_gather_mean_and_any() -> None:
    for rows, mean, any_set, none_set in run_ranks(gathered_ranks, 2):
        assert rows.flatten().tolist() == [0, 0, 1, 1]
        assert mean == 0.5
        assert any_set
        assert not none_set


def test_synchronized_batchnorm_evaluates_like_batchnorm() -> None:
    module = network().eval()
    synchronized = synchronize_batchnorm(network(), World(size=2)).eval()
    x = images()[0]
    torch.testing.assert_close(synchronized(x), module(x))


def unusual_batchnorms() -> list[nn.Module]:
    kinds = [{"momentum": None}, {"momentum": 0.0}, {"affine": False}, {"track_running_stats": False}]
    return [nn.BatchNorm2d(3, **kind) for kind in kinds]  # type: ignore[arg-type]


def outputs_and_statistics(world: World) -> list[list[torch.Tensor]]:
    """Of layers that are BatchNorm themselves: what two batches become, then the buffers."""
    results = []
    for module in unusual_batchnorms():
        layer = synchronize_batchnorm(module, world)
        per_rank = _BATCH // world.size
        batches = [x[world.rank * per_rank : (world.rank + 1) * per_rank] for x in images()]
        results.append([*(layer(x).detach() for x in batches), *(buffer.float() for buffer in layer.buffers())])
    return results


def test_every_kind_of_batchnorm_is_synchronized() -> None:
    expected = outputs_and_statistics(World())
    ranks = run_ranks(outputs_and_statistics, 2)
    for number, (y0, y1, *buffers) in enumerate(expected):
        layers = [found[number] for found in ranks]
        torch.testing.assert_close(torch.cat([layer[0] for layer in layers]), y0)
        torch.testing.assert_close(torch.cat([layer[1] for layer in layers]), y1)
        for layer in layers:
            torch.testing.assert_close(layer[2:], buffers)
