"""Pretrain an encoder without labels.

    torchrun --standalone --nproc_per_node=2 -m train.pretrain --config configs/x.yaml optim.epochs=200

A run that is started again continues from its newest checkpoint, on any number of processes, and sees exactly the
batches that it would have seen.
"""

import argparse
import logging
import math
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.cache import CacheOptions
from pipeline.loader import Loader
from sharding.command import UserError, command
from sharding.manifest import Manifest, ShardSet, open_shards
from train import checkpoint, schedule
from train.config import Config, load_config
from train.curves import draw_curves
from train.distributed import World, session, synchronize_batchnorm
from train.methods import build_method
from train.monitor import Monitor
from train.optim import build_optimizer
from train.step import TrainStep

log = logging.getLogger("train")


@command("train.pretrain")
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    config = load_config(options.config, options.overrides)
    with session() as world:
        pretrain(config, world)
    return 0


def pretrain(config: Config, world: World) -> None:
    """The story of a run. Raises ValueError or OSError for what the user can mend, before any work where possible."""
    shards = open_shards(config.data.shards)
    check_batch(config, shards.manifest, world)
    plan = plan_run(config, shards.manifest)
    identity = checkpoint.Identity.of(config, shards.manifest)
    state = _resumed(config, identity)
    start_step = state["step"] if state else 0

    torch.manual_seed(config.run.seed)
    method: Any = build_method(config.method, config.encoder, world.gather, world.rank)
    method = method.to(world.device, memory_format=torch.channels_last)
    if config.run.sync_batchnorm:
        method = synchronize_batchnorm(method, world)
    optimizer = build_optimizer(config.optim, method)
    if state:
        method.load_state_dict(state["method"])
        optimizer.load_state_dict(state["optimizer"])
    compiled: Any = torch.compile(method) if config.run.compile else method
    wrapped = world.wrap(compiled)
    train_step = TrainStep(method, wrapped, optimizer, precision(config, world))
    stop = StopRequest()

    def save(step: int) -> None:
        if world.is_main:
            tensors = {"method": method.state_dict(), "optimizer": optimizer.state_dict()}
            plain = {"step": step, "identity": asdict(identity), "config": config.model_dump(mode="json")}
            checkpoint.save(config.run.dir, step, {**tensors, **plain}, config.run.keep_checkpoints)

    with ExitStack() as stack:
        loader = stack.enter_context(build_loader(config, shards, world, start_step))
        monitor = _start_monitor(config, world, start_step, plan, stack)
        for step in range(start_step, plan.total_steps):
            batch = next(loader)
            learning_rate = plan.learning_rate(step)
            done = step + 1
            loss, metrics = train_step(batch.views, learning_rate, done / plan.total_steps)
            if monitor:
                monitor.advance(done)
            last = done == plan.total_steps
            if done % config.run.log_every == 0 or last:
                loss = world.mean(loss)
                train_step.check()
                if monitor:
                    values = {name: value.item() for name, value in {"loss": loss, **metrics}.items()}
                    monitor.log(done, {**values, "learning_rate": learning_rate}, loader.stats())
                last = last or world.any(stop.requested)
            if done % config.run.checkpoint_every == 0 or last:
                train_step.check()
                save(done)
            if last:
                break
    world.barrier()
    if world.is_main:
        _finish(config)


@dataclass(frozen=True)
class RunPlan:
    """How long a run is and which learning rate each of its steps has."""

    total_steps: int
    warmup_steps: int
    peak: float

    def learning_rate(self, step: int) -> float:
        return schedule.warmup_cosine(
            step, total_steps=self.total_steps, warmup_steps=self.warmup_steps, peak=self.peak
        )


def plan_run(config: Config, manifest: Manifest) -> RunPlan:
    """Epochs as steps of the data set at hand."""
    batch, optim = config.run.global_batch_size, config.optim
    steps_per_epoch = manifest.num_samples / batch
    warmup_steps = round(optim.warmup_epochs * steps_per_epoch)
    peak = schedule.scaled_peak(optim.learning_rate, batch, optim.scaling)
    if optim.steps is not None:
        return RunPlan(optim.steps, min(warmup_steps, optim.steps // 10), peak)
    return RunPlan(math.ceil(optim.epochs * steps_per_epoch), warmup_steps, peak)


def check_batch(config: Config, manifest: Manifest, world: World) -> None:
    """Raises ValueError unless lanes and processes divide the global batch."""
    batch = config.run.global_batch_size
    for count, what in ((manifest.num_lanes, "lanes of the shards"), (world.size, "processes")):
        if batch % count:
            raise UserError(f"run.global_batch_size: expected a multiple of the {count} {what}, found {batch}")


def build_loader(config: Config, shards: ShardSet, world: World, start_step: int) -> Loader:
    return Loader(
        shards,
        config.views,
        seed=config.run.seed,
        global_batch_size=config.run.global_batch_size,
        rank=world.rank,
        world_size=world.size,
        start_step=start_step,
        window=config.data.window,
        backend=config.data.backend,
        canary_every=config.data.canary_every,
        num_threads=config.data.num_threads or cores_per_process(),
        prefetch=config.data.prefetch,
        max_replaced_samples=config.data.max_replaced_samples,
        cache=cache_options(config),
        device=world.device,
        dtype=precision(config, world),
    )


def cache_options(config: Config) -> CacheOptions | None:
    if config.data.cache_dir is None:
        return None
    limit = config.data.cache_bytes
    return CacheOptions(config.data.cache_dir, limit, limit // processes_on_node())


def cores_per_process() -> int:
    """The cores this process may use, shared with the other processes of its node."""
    return max(1, len(os.sched_getaffinity(0)) // processes_on_node())


def processes_on_node() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def precision(config: Config, world: World) -> torch.dtype:
    """The dtype of autocast; parameters, losses and optimizer state are float32."""
    automatic = "bf16" if world.device.type == "cuda" else "fp32"
    chosen = automatic if config.run.precision == "auto" else config.run.precision
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[chosen]


class StopRequest:
    """Turns SIGTERM into a flag that the loop reads where all ranks agree; the run then saves and ends."""

    def __init__(self) -> None:
        self.requested = False
        signal.signal(signal.SIGTERM, self._request)

    def _request(self, *_: object) -> None:
        self.requested = True


def _resumed(config: Config, identity: checkpoint.Identity) -> dict[str, Any] | None:
    state = checkpoint.load_latest(config.run.dir) if config.run.resume else None
    if state:
        checkpoint.check_identity(state, identity, config.run.dir)
    elif not config.run.resume and checkpoint.checkpoints(config.run.dir):
        raise UserError(f"run.dir: {config.run.dir} holds checkpoints and run.resume is false; choose another run.dir")
    return state


def _start_monitor(config: Config, world: World, start_step: int, plan: RunPlan, stack: ExitStack) -> Monitor | None:
    if not world.is_main:
        return None
    config.run.dir.mkdir(parents=True, exist_ok=True)
    (config.run.dir / "config.yaml").write_text(config.to_yaml())
    print(config.to_yaml())
    if start_step:
        print(f"continuing at step {start_step} of {plan.total_steps}")
    return stack.enter_context(Monitor(config.run.dir, start_step, plan.total_steps, config.run.global_batch_size))


def _finish(config: Config) -> None:
    picture = draw_curves(config.run.dir)
    print(f"checkpoints and metrics: {config.run.dir}   curves: {picture}")
    print(f"next: python -m train.evaluate --checkpoint {config.run.dir}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchrun --standalone --nproc_per_node=N -m train.pretrain",
        description="Pretrain an encoder without labels. Starting the same run again continues it.",
        epilog="All settings with their defaults: python -m train.config",
    )
    parser.add_argument("--config", type=Path, help="YAML file; see configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="e.g. optim.epochs=200 views.size=96"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
