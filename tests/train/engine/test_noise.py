from typing import Any

import pytest
import torch
from torch import nn

from sharding.command import UserError
from tests.processes import run_ranks
from tests.train.engine.test_gradcache import Dropping, Separate, batch
from tests.train.runs import settings
from train.engine.monitor import read_metrics
from train.engine.noise import NoiseScale, critical_batch_size
from train.engine.step import TrainStep
from train.optim.optimizers import OptimConfig, build_optimizer
from train.pretrain import main
from train.processes.distributed import World


def test_of_a_quadratic_with_known_noise() -> None:
    """The mean over images of |theta - x|^2 / 2, x ~ N(0, diag(s^2)): G = theta, tr(Sigma) = sum s^2."""
    generator = torch.Generator().manual_seed(0)
    std = torch.linspace(0.5, 2, 20, dtype=torch.float64)
    module = nn.Linear(20, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(theta := module.weight, 0.7)
    noise = NoiseScale(module, batch=64, part=16, world_size=1, decay=1.0)
    for _ in range(500):
        theta.grad = None
        for part in (std * torch.randn(64, 20, generator=generator, dtype=torch.float64)).split(16):
            ((theta - part).square().sum(1).mean() / 2 / 4).backward()
        found = noise(torch.as_tensor(theta.grad).norm())
    assert found["gradient_noise"].item() == pytest.approx(std.square().sum().item(), rel=0.05)
    assert found["gradient_signal"].item() == pytest.approx(20 * 0.7**2, rel=0.05)
    critical = critical_batch_size({name: value.item() for name, value in found.items()})
    assert critical["critical_batch_size"] == pytest.approx(std.square().sum().item() / (20 * 0.7**2), rel=0.05)


def test_no_batch_size_is_named_while_the_signal_is_not_positive() -> None:
    assert critical_batch_size({"gradient_noise": 1.0, "gradient_signal": -0.1}) == critical_batch_size({}) == {}


def test_the_average_forgets() -> None:
    module = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    noise = NoiseScale(module, batch=2, part=1, world_size=1, decay=0.5)
    found = []
    for size in (1.0, 0.0, 0.0):
        for _ in range(2):
            (size * module.weight / 2).sum().backward()
        found.append(noise(torch.tensor(size, dtype=torch.float64))["gradient_signal"].item())
    assert found == [1.0, 0.5, 0.25]


def measured_of_both(world: World) -> list[list[torch.Tensor]]:
    return [measured(world, kind, 3) for kind in (Separate, Dropping)]


def measured(world: World, kind: type[Dropping], size: int) -> list[torch.Tensor]:
    """After two updates whose parts have ``size`` images: noise and signal, averaged over ranks."""
    torch.manual_seed(0)
    method = kind(world).double()
    optimizer = build_optimizer(OptimConfig(name="sgd"), method)
    step: Any = TrainStep(method, world.wrap(method), optimizer, torch.float64, micro_batch_size=size)
    views, draws, _ = batch(world)
    noise = NoiseScale(method, 12, size, world.size)
    for _ in range(2):
        found = noise(step(views, draws, 0.1, 0.5).metrics["gradient_norm"])
    return [world.mean(value) for value in found.values()]


def test_processes_measure_what_micro_batches_do() -> None:
    expected = measured_of_both(World())
    for found in run_ranks(measured_of_both, 2):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_batch_in_one_part_is_refused() -> None:
    with pytest.raises(UserError, match=r"run\.noise_scale: .*set run\.micro_batch_size=32"):
        NoiseScale(nn.Linear(1, 1), batch=64, part=64, world_size=1)


def test_a_run_logs_it(shards: Any, tmp_path: Any) -> None:
    more = ["optim.steps=2", "run.noise_scale=true", "run.micro_batch_size=6"]
    assert main(settings(shards, tmp_path, *more)) == 0
    for record in read_metrics(tmp_path):
        assert record["gradient_noise"] > 0
        assert ("critical_batch_size" in record) == (record["gradient_signal"] > 0)
