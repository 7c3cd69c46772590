"""Activations that are computed again in backward change no bit, and take less memory."""

from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch

from benchmarks.measure import peak_bytes
from pipeline.loader import Batch
from tests.processes import run_ranks
from tests.train.runs import settings_of
from train.config import Config, load_config
from train.engine.plan import RunPlan
from train.pretrain import Pretraining, build, optimizer_of
from train.processes.distributed import World

RUNS: dict[str, list[str]] = {
    "simclr": [],
    "byol": ["run.micro_batch_size=4"],
    "dino": ["encoder.drop_path=0.5"],
    "mae": [],
}
AGAIN = "run.activation_checkpointing=true"


def task_of(method: str, world: World, *more: str) -> tuple[Config, Pretraining]:
    config = load_config(None, settings_of(method, Path("none"), Path("none"), *RUNS[method], *more))
    made = build(config, world)
    return config, Pretraining(
        config, world, RunPlan(20, 0, 0.05, config.optim), made, optimizer_of(config, made, world)
    )


def batch_of(config: Config, world: World, step: int, size: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(step)
    sizes = [group.size for group in config.views for _ in range(group.count)]
    rows = slice(world.rank * size // world.size, (world.rank + 1) * size // world.size)
    views = [torch.randn(size, 3, s, s, generator=generator)[rows] for s in sizes]
    return Batch(step, views, torch.zeros(size, dtype=torch.int64)[rows], torch.arange(size)[rows])


def states(world: World, method: str) -> list[dict[str, torch.Tensor]]:
    """After two updates, with and without."""
    found = []
    for more in ([], [AGAIN]):
        config, task = task_of(method, world, *more)
        for step in range(2):
            task(batch_of(config, world, step), step)
        found.append(task.method.state_dict())
    return found


@pytest.mark.parametrize("method", RUNS)
def test_two_updates_are_the_same_to_the_bit(method: str) -> None:
    expected, found = states(World(), method)
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []


def test_so_they_are_with_statistics_over_processes() -> None:
    for expected, found in run_ranks(states, 2, "simclr"):
        assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []


def test_it_takes_less_memory() -> None:
    peaks = []
    for more in ([], [AGAIN]):
        config, task = task_of("simclr", World(), "views.size=32", *more)
        batch, steps = batch_of(config, World(), 0, 24), count()
        work = partial(lambda task, batch, steps: task(batch, next(steps)), task, batch, steps)
        work()
        peaks.append(peak_bytes(work))
    assert peaks[1] < 0.8 * peaks[0], peaks
