"""N processes must give the single process's gradient of the global batch."""

from typing import Any

import pytest
import torch
from torch import nn

from sharding.command import UserError
from tests.processes import run_ranks
from train.losses.contrastive import nt_xent
from train.model.batchnorm import synchronize_batchnorm
from train.processes.distributed import AnyRank, World

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
    columns = world.gather(torch.full((1, 2), float(world.rank)), dim=1)
    any_rank = AnyRank(world)
    answers = [any_rank(world.rank == 1 and step == 1) for step in range(4)]
    return [rows, columns, world.mean(torch.tensor(float(world.rank))), world.broadcast(world.rank), answers]


@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_and_statistics_are_those_of_one_process(world_size: int) -> None:
    expected = contrastive_gradients(World())
    for found in run_ranks(contrastive_gradients, world_size):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_gather_mean_broadcast_and_any() -> None:
    for rows, columns, mean, broadcast, answers in run_ranks(gathered_ranks, 2):
        assert rows.flatten().tolist() == columns.flatten().tolist() == [0, 0, 1, 1]
        assert (mean, broadcast) == (0.5, 0)
        assert answers == [False, False, True, False], "known one call later, by all"


def test_a_single_process_is_told_at_once() -> None:
    assert [AnyRank(World())(flag) for flag in (True, False)] == [True, False]


def disagreement(world: World) -> str:
    world.require_agreement({"run.seed": 0, "method.temperature": 0.1})
    try:
        world.require_agreement({"run.seed": 0, "method.temperature": 0.1 + 0.8 * (world.rank == 1)})
    except UserError as error:
        return str(error)
    return ""


def test_ranks_that_disagree_all_say_who_and_on_what() -> None:
    for message in run_ranks(disagreement, 3):
        assert message.startswith("the ranks disagree on method.temperature: rank 0 has 0.1, rank 1 has 0.9")


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
