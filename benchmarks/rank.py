"""One process of `benchmarks.scaling`, which starts it: measures its share of the stages together with the others."""

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.measure import come_to_rest
from benchmarks.stages import Training, finish, load
from pipeline.loader import Loader
from sharding.command import command
from sharding.manifest import ShardSet, open_shards
from train.config import Config, load_config
from train.pretrain import build_loader
from train.processes.distributed import World, session
from train.processes.neighbours import Neighbours

_REPEATS = 10  # of messages that are sent alone, and of steps whose times are compared over ranks
_FLOAT = 4  # bytes
MESSAGES = ("batchnorm", "gather", "gradient")


@command("benchmarks.scaling")
def main(config_file: str, out: str, num_cores: str, seconds: str, explain: str) -> int:
    with session("benchmarks.scaling") as world:
        _pin(world.rank, int(num_cores))
        config = load_config(Path(config_file))
        shards = open_shards(config.data.shards)
        with build_loader(config, shards, world, 0) as loader:
            found = measure(config, shards, loader, world, float(seconds), explain == "True")
        if world.is_main:
            Path(out).write_text(json.dumps(found))
    return 0


def measure(
    config: Config, shards: ShardSet, loader: Loader, world: World, seconds: float, explain: bool
) -> dict[str, float]:
    """Images/s of all ranks by stage; with ``explain`` also what lies between single processes and the whole step."""
    counting = Counting(world.rank, world.size, world.device, world.control)
    training = Training(config, shards, counting)
    step = training.alone(loader)
    found = {"size": float(world.size), "batch": float(config.run.global_batch_size)}
    found |= _messages(training, step, counting)
    stages: dict[str, Callable[[], int]] = {
        "step": step,
        "loader": partial(load, loader),
        "end to end": partial(training.fed, loader),
    }
    if explain:
        local = config.model_copy(update={"run": config.run.model_copy(update={"batchnorm": "local"})})
        unaveraged = Unaveraged(world.rank, world.size, world.device, world.control)
        apart = Training(config, shards, World(device=world.device)).alone(loader)
        stages |= {
            "apart": apart,
            "local BatchNorm": Training(local, shards, world).alone(loader),
            "gradients not averaged": Training(config, shards, unaveraged).alone(loader),
        }
        found |= {"slowest_seconds": _lead(apart, world), **_alone(found, world)}
    batch, warmup = config.run.global_batch_size, config.data.prefetch + 1
    return found | {name: _rate(work, batch, world, seconds, warmup) for name, work in stages.items()}


@dataclass(frozen=True)
class Counting(World):
    """Notes the bytes that a rank sends in `gather` and `mean`."""

    sent: list[int] = field(default_factory=list)

    def gather(self, rows: torch.Tensor, dim: int = 0) -> torch.Tensor:
        self.sent.append(rows.nbytes)
        return super().gather(rows, dim)

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        self.sent.append(value.nbytes)
        return super().mean(value)


class Unaveraged(World):
    """Leaves each rank its own gradients."""

    def wrap(self, module: nn.Module, *_: object, **__: object) -> nn.Module:
        return module


def _pin(rank: int, num_cores: int) -> None:
    """To as many cores, which no other rank has while there are enough."""
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {allowed[(rank * num_cores + i) % len(allowed)] for i in range(num_cores)})
    torch.set_num_threads(num_cores)


def _messages(training: Training, step: Callable[[], int], world: Counting) -> dict[str, float]:
    """Number and bytes of what a rank sends in a step, forward and backward: BatchNorm's statistics, what
    `World.gather` and `World.mean` are given, gradients; and bytes of the weights that post-local SGD averages."""
    norms = [m for m in training.method.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    sizes: list[int] = []
    hooks = [m.register_forward_hook(lambda m, *_: sizes.append(2 * m.num_features * _FLOAT)) for m in norms]
    step()  # the first also has DDP arrange its buckets
    for noted in (sizes, world.sent):
        noted.clear()
    step()
    for hook in hooks:
        hook.remove()
    sent = {"batchnorm": 2 * sizes, "gather": 2 * world.sent}
    sent["gradient"] = [sum(p.nbytes for p in training.method.parameters() if p.requires_grad)]
    counts: dict[str, float] = {f"{what}_messages": len(messages) for what, messages in sent.items()}
    counts |= {f"{what}_bytes": sum(messages) for what, messages in sent.items()}
    teachers = sum(p.nbytes for teacher, _ in training.method.teachers() for p in teacher.parameters())
    return {**counts, "weight_bytes": counts["gradient_bytes"] + teachers}


def _alone(sent: dict[str, float], world: World) -> dict[str, float]:
    """Seconds that the average of such messages takes when nothing else is done; ``latency``: of the shortest."""

    def seconds(send: Callable[[torch.Tensor], object], count: float, num_bytes: float) -> float:
        message = torch.zeros(max(1, round(num_bytes / max(1, count) / _FLOAT)), device=world.device)
        return statistics.median(_times(lambda: [send(message) for _ in range(round(count))], world))

    neighbours = Neighbours()
    on_gpu = world.device.type == "cuda"
    by: dict[str, Callable[[torch.Tensor], object]] = {
        "batchnorm": world.mean if on_gpu else lambda message: neighbours.gather(message.numpy()),
        "gather": world.gather,
        "gradient": world.mean,
    }
    found = {f"{what}_seconds": seconds(by[what], sent[f"{what}_messages"], sent[f"{what}_bytes"]) for what in MESSAGES}
    return found | {"latency_seconds": seconds(world.mean, 10, 0) / 10}


def _lead(step: Callable[[], int], world: World) -> float:
    """Seconds a step by which the slowest rank exceeds the mean of all, if they meet once a step."""
    ranks = world.gather(torch.tensor(_times(step, world), device=world.device)).view(world.size, -1)
    return (ranks.max(0).values - ranks.mean(0)).mean().item()


def _times(work: Callable[[], object], world: World) -> list[float]:
    return [_seconds(work, 1, world) for _ in range(_REPEATS)]


def _seconds(work: Callable[[], object], count: int, world: World) -> float:
    """Of as many calls on this rank, begun together with the others."""
    world.barrier()
    start = time.perf_counter()
    for _ in range(count):
        work()
    finish()
    return time.perf_counter() - start


def _rate(work: Callable[[], int], batch: int, world: World, seconds: float, warmup: int) -> float:
    """Images/s of all ranks, each of which does as many steps: the slowest decides."""
    come_to_rest()
    _seconds(work, warmup, world)
    count = world.broadcast(max(2, math.ceil(seconds / _seconds(work, 1, world))))
    elapsed = torch.tensor([_seconds(work, count, world)], device=world.device)
    return count * batch / world.gather(elapsed).max().item()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
