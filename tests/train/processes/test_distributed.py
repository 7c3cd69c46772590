"""N processes must give the single process's gradient of the global batch."""

import os
from typing import Any

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from sharding.command import UserError
from tests.processes import run_ranks
from train.losses.contrastive import nt_xent
from train.model.batchnorm import synchronize_batchnorm
from train.processes.communication import Communication, ParallelConfig
from train.processes.distributed import AnyRank, World

_BATCH = 12


def images() -> torch.Tensor:
    return torch.randn(2, _BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    """With the layer of most of timm's networks, which has a ReLU in it."""
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), BatchNormAct2d(8)
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(288, 16), nn.BatchNorm1d(16))


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


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_synchronized_batchnorm_evaluates_like_batchnorm(device: str) -> None:
    """For a GPU, too: torch's layers take CPU tensors in evaluation."""
    module = network().eval()
    synchronized = synchronize_batchnorm(network(), World(size=2, device=torch.device(device))).eval()
    assert synchronized.state_dict().keys() == module.state_dict().keys()
    x = images()[0]
    torch.testing.assert_close(synchronized(x), module(x))


def unusual_batchnorms() -> list[nn.Module]:
    kinds = [{"momentum": None}, {"momentum": 0.0}, {"affine": False}, {"track_running_stats": False}]
    return [*(nn.BatchNorm2d(3, **kind) for kind in kinds), BatchNormAct2d(3, act_layer=nn.PReLU)]  # type: ignore[arg-type]


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


_GROUPS = {"local": 1, "2": 2, "node": 2, "global": 4, "4": 4}  # of how many ranks


def outputs_of_groups(world: World) -> list[list[torch.Tensor]]:
    """Of each kind of group: what the network makes of this rank's images, gradients and statistics."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    per_rank, results = _BATCH // world.size, []
    for over in _GROUPS:
        module = synchronize_batchnorm(network(), world, over)
        x = images()[0][world.rank * per_rank :][:per_rank].clone().requires_grad_()
        y = module(x)
        y.square().sum().backward()
        averages = [world.mean(p.grad) for p in module.parameters() if p.grad is not None]
        results.append([y.detach(), torch.as_tensor(x.grad), *averages, *(b.float() for b in module.buffers())])
    return results


def test_batchnorm_of_a_group_of_ranks_is_that_of_one_process_with_their_images() -> None:
    everything = run_ranks(outputs_of_groups, 4)
    for number, size in enumerate(_GROUPS.values()):
        ranks, gradients = [results[number] for results in everything], []
        for first in range(0, 4, size):
            rows = slice(first * _BATCH // 4, (first + size) * _BATCH // 4)
            module, x = network(), images()[0][rows].clone().requires_grad_()
            y = module(x)
            y.square().sum().backward()
            members = ranks[first : first + size]
            torch.testing.assert_close(torch.cat([found[0] for found in members]), y.detach())
            torch.testing.assert_close(torch.cat([found[1] for found in members]), x.grad, rtol=1e-4, atol=1e-5)
            for found in members:
                torch.testing.assert_close(found[-9:], [buffer.float() for buffer in module.buffers()])
            gradients.append([p.grad for p in module.parameters() if p.grad is not None])
        expected = [torch.stack(of_groups).sum(0) / 4 for of_groups in zip(*gradients, strict=True)]
        torch.testing.assert_close(ranks[0][2:-9], expected, rtol=1e-3, atol=1e-4)


def test_groups_that_would_not_be_equal_are_refused() -> None:
    for over, found in (("3", 3), ("node", 0)):
        with pytest.raises(UserError, match=rf"run\.batchnorm={over}: .*a divisor of the 4 processes, found {found}"):
            synchronize_batchnorm(network(), World(size=4), over)


def gradients_by(world: World) -> list[torch.Tensor]:
    """Of all parameters together: as they are, in small buckets, and compressed."""
    results = []
    for kind, bucket_mb in (("none", 25), ("none", 1), ("bf16", 25), ("fp16", 25)):
        module = synchronize_batchnorm(network(), world)
        config = ParallelConfig(gradient_compression=kind, bucket_mb=bucket_mb)
        wrapped = Communication(module, world, config).module
        for _ in range(2):  # DDP rearranges its buckets after the first
            module.zero_grad()
            x = images()[0][world.rank * _BATCH // world.size :][: _BATCH // world.size]
            wrapped(x).square().mean().backward()
        results.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
    return results


def test_compressed_gradients_are_close_and_equal_on_all_ranks() -> None:
    ranks = run_ranks(gradients_by, 2)
    plain, small, bf16, fp16 = ranks[0]
    torch.testing.assert_close(small, plain)
    for compressed, tolerance in ((bf16, 2**-8), (fp16, 2**-10)):
        assert 0 < (compressed - plain).norm() < tolerance * plain.norm()
    for a, b in zip(*ranks, strict=True):
        assert torch.equal(a, b)
