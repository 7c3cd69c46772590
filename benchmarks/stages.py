"""What is measured: a run of any configuration, its loader and its train step apart and together."""

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from benchmarks.generated import generated_shards
from benchmarks.measure import Turn, rate_of
from pipeline.loader import Batch, Loader
from sharding.command import UserError
from sharding.manifest import MANIFEST_FILE, ShardSet
from train.config import Config, load_config
from train.engine.plan import plan_run
from train.pretrain import Pretraining, build, build_loader, optimizer_of
from train.processes.distributed import World

NUM_CACHED = 3  # batches on the device for the step alone


def add_arguments(parser: argparse.ArgumentParser, rounds: int, seconds: float) -> None:
    """What the benchmarks have in common: the configuration as `train.pretrain` has it, length, and where to save."""
    add = parser.add_argument
    add("--config", type=Path, help="YAML file of a run; see configs/")
    add("--shards", help="directory made by sharding.build (default: data.shards, or else generated images)")
    add("--rounds", type=int, default=rounds, help="interleaved rounds (default: %(default)s)")
    add("--seconds", type=float, default=seconds, help="timed seconds of each turn (default: %(default)s)")
    add("--out", type=Path, help="JSON lines file for every round, with machine and versions")
    add("--picture", type=Path, help="PNG file for a chart")
    add("overrides", nargs="*", metavar="section.field=value", help="e.g. method.name=byol run.global_batch_size=64")


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand anywhere, also behind an option that takes several values."""
    given = sys.argv[1:] if arguments is None else arguments
    overrides = [argument for argument in given if re.match(r"[a-z_]+(\.\w+)+=", argument)]
    return parser.parse_args([*overrides, *(argument for argument in given if argument not in overrides)])


def read_config(options: argparse.Namespace, stack: ExitStack) -> Config:
    """The configuration, without a file a small one, with shards that exist. Raises UserError for what cannot be."""
    if options.rounds < 1 or options.seconds <= 0:
        raise UserError(f"expected --rounds >= 1 and --seconds > 0, found {options.rounds} and {options.seconds}")
    small = (
        ["run.global_batch_size=64"] if torch.cuda.is_available() else ["run.global_batch_size=16", "encoder=resnet18"]
    )
    overrides = [*([] if options.config else small), *options.overrides]
    overrides += [f"data.shards={options.shards}"] if options.shards else []
    config = load_config(options.config, overrides)
    asked = any(override.startswith("data.shards=") for override in overrides)
    if asked or (Path(config.data.shards) / MANIFEST_FILE).exists():
        return config
    return load_config(options.config, [*overrides, f"data.shards={generated_shards(stack, num_images=256)}"])


class Training:
    """The train step of a configuration as a callable that takes a batch and returns how many images it had."""

    def __init__(self, config: Config, shards: ShardSet, world: World) -> None:
        plan = plan_run(config, shards.manifest.num_samples)
        self.method = build(config, world)
        self._task = Pretraining(config, world, plan, self.method, optimizer_of(config, self.method, world))
        self._steps = cycle(range(plan.total_steps))
        self._waits: list[tuple[Any, Any]] = []

    def __call__(self, batch: Batch) -> int:
        self._task(batch, next(self._steps))
        return len(batch.ids)

    def alone(self, loader: Loader) -> Callable[[], int]:
        """Steps on batches that are there already: the ceiling of what any loader can reach."""
        cached = cycle([next(loader) for _ in range(NUM_CACHED)])
        return lambda: self(next(cached))

    def fed(self, loader: Loader) -> int:
        """A step on what the loader brings."""
        before, batch = _now(), next(loader)
        self._waits.append((before, _now()))
        return self(batch)

    def end_to_end(self, loader: Loader, seconds: float, ahead: int) -> Turn:
        """A turn on what the loader brings, once what it had ``ahead`` is used up."""
        both = partial(self.fed, loader)
        rate_of(both, 0, ahead)
        self.waited_seconds()
        start = time.perf_counter()
        turn = rate_of(both, seconds, 0, finish=finish)
        return {**turn, "wait_percent": 100 * self.waited_seconds() / (time.perf_counter() - start)}

    def waited_seconds(self) -> float:
        """Time since the last call in which the train step stood still for data: on a GPU the device's, between the
        end of a step and the beginning of the next (normalising is in it). Waits for the device."""
        finish()
        on_gpu = torch.cuda.is_available()
        waited = sum(a.elapsed_time(b) / 1000 if on_gpu else b - a for a, b in self._waits)
        self._waits = []
        return waited


def open_loader(config: Config, shards: ShardSet, **data: object) -> Loader:
    """Of a configuration whose section ``data`` is changed."""
    changed = config.model_copy(update={"data": config.data.model_copy(update=data)})
    return build_loader(changed, shards, World(device=device()), 0)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(loader: Loader) -> int:
    return len(next(loader).ids)


def finish() -> None:
    """Wait for the device: also for batches that are prefetched on it, of which there are as many before and after."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _now() -> Any:
    """A moment of the device: an event on a GPU, else seconds."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
