"""Pretrain an encoder without labels.

    torchrun --standalone --nproc_per_node=2 -m train.pretrain --config configs/x.yaml optim.epochs=200

A run that is started again continues from its newest checkpoint, on any number of processes, and sees exactly the
batches that it would have seen. Ctrl-C, SIGTERM and SIGUSR1 save after the step at hand and end with exit code 3.
"""

import json
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.loader import Batch, Loader
from pipeline.order import Order, lanes_of_rank
from pipeline.reading.cache import CacheOptions
from sharding.command import Parser, UserError, command
from sharding.manifest import Manifest, ShardSet, open_shards
from train.config import Config, DataConfig, load_config
from train.engine import automatic, checkpoint, health
from train.engine.loop import Clock, Hook, StepDone, fit
from train.engine.monitor import Monitor, read_metrics
from train.engine.noise import NoiseScale, critical_batch_size
from train.engine.plan import RunPlan, check_batch, check_labels, plan_run
from train.engine.step import TrainStep
from train.methods import Loss, Method, build_method
from train.model.batchnorm import synchronize_batchnorm
from train.model.checkpointing import blocks, compute_again
from train.model.draws import Draws
from train.model.encoder import Encoder
from train.online import Online, has_labels
from train.optim.optimizers import Make, build_optimizer, plain, restore
from train.overrides import leaves
from train.processes import fsdp, stop
from train.processes.communication import Communication, handed_out
from train.processes.distributed import AnyRank, World, session
from train.processes.run_directory import run_directory

log = logging.getLogger(__name__)


@command("train.pretrain")
def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(
        "torchrun --standalone --nproc_per_node=N -m train.pretrain",
        "Pretrain an encoder without labels. Starting the same run again continues it.",
        "Exit codes: 0 finished, 2 an error that the message says how to put right,\n"
        "3 stopped by Ctrl-C, SIGTERM or SIGUSR1 with everything saved (torchrun: 1).",
    ).parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    config = load_config(options.config, options.overrides)
    with session("train.pretrain") as world:
        finished = pretrain(config, world)
    return 0 if finished else stop.EXIT_CODE


def pretrain(config: Config, world: World) -> bool:
    """The story of a run: True at its end, False if it was stopped before.

    Raises UserError or OSError for what the user can put right, before any work where possible.
    """
    num_lanes = Manifest.load(config.data.shards).num_lanes
    shards = open_shards(config.data.shards, lanes_of_rank(num_lanes, world.rank, world.size))
    check_batch(config, shards.manifest, world.size)
    check_labels(config, shards)
    plan = plan_run(config, shards.manifest.num_samples)

    def begin(anew: bool) -> Beginning:
        method = build(config, world, anew)
        return method, optimizer_of(config, method, world)

    _, done = train(config, shards, plan, world, begin)
    if world.is_main:
        _say_goodbye(config, done, plan)
    return done >= plan.total_steps


Beginning = tuple[Method, torch.optim.Optimizer]  # on their device


def train(
    config: Config,
    shards: ShardSet,
    plan: RunPlan,
    world: World,
    begin: Callable[[bool], Beginning],
    order: Order | None = None,
) -> tuple[Method, int]:
    """Train what ``begin`` makes, from the newest checkpoint in ``run.dir`` on, to the end of the plan or until it is
    asked to stop; ``begin`` is told whether there is none. ``order`` is a `Loader`'s. Returns the method and the number
    of updates of the run."""
    identity = checkpoint.identity_of(config, shards.manifest.fingerprint)
    with ExitStack() as stack:
        if world.is_main:
            stack.enter_context(run_directory(config.run.dir))
        state = handed_out(_resumed(config, identity) if world.is_main else None, world, config.run)
        start_step = state["step"] if state else 0
        world.require_agreement(run_facts(config, shards, start_step))
        task = Pretraining(config, world, plan, *begin(state is None))
        if state:
            task.load(state)
        if start_step >= plan.total_steps:
            return task.method, _nothing_to_do(config, start_step, plan, world)

        online = _online(config, shards, task.method, world, state)
        request, any_rank = stack.enter_context(stop.StopRequest()), AnyRank(world)
        if world.is_main:
            _introduce(task, state)
            _record_start(config, shards, start_step, plan, world.size)
        loader = stack.enter_context(build_loader(config, shards, world, start_step, order))
        clock, monitor, writer, run, watch = Clock(), None, None, config.run, health.Watch()
        if world.is_main:
            watch = health.Watch(r for r in read_metrics(run.dir) if r["step"] <= start_step)
            sizes = plan.total_steps, run.global_batch_size
            monitor = stack.enter_context(Monitor(run.dir, start_step, *sizes, run.loggers))
            writer = stack.enter_context(checkpoint.Writer(run.dir, run.keep_checkpoints, run.keep_every))
        hooks: list[Hook] = [online] if online else []
        hooks += [Log(task, loader, clock, monitor, online, watch), Save(task, clock, writer, identity, online)]
        done = fit(task, loader, plan.total_steps, hooks, lambda: any_rank(request.requested), start_step)
    world.barrier()
    return task.method, done


def build(config: Config, world: World, anew: bool = True) -> Method:
    """The method on its device, with BatchNorm as configured; ``anew`` with the weights that it is to begin with."""
    torch.manual_seed(config.run.seed)
    method = build_method(config.method, config.encoder, world)
    if anew and config.run.init_from:
        checkpoint.initialize(method.encoder, config.run.init_from)
        for teacher, student in method.teachers():
            teacher.load_state_dict(student.state_dict())
    for encoder, weights in method.pretrained() if anew else ():
        if weights is None:
            log.warning("method.weights is not set: the teacher is an untrained network")
        else:
            checkpoint.initialize(encoder, weights, "method.weights")
    dtype = torch.float64 if config.run.precision == "fp64" else torch.float32
    method = synchronize_batchnorm(method.to(world.device, dtype), world, config.run.batchnorm)
    parts = [block for module in method.modules() if isinstance(module, Encoder) for block in blocks(module.backbone)]
    if config.run.activation_checkpointing:
        for block in parts:
            compute_again(block)
    if config.run.parallel == "fsdp" and world.size > 1:
        fsdp.shard_parameters(method, parts, automatic.dtype(config, world))
        return method
    return method.to(memory_format=torch.channels_last)


def optimizer_of(config: Config, method: Method, world: World) -> torch.optim.Optimizer:
    make: Make = world.shard if config.run.shard_optimizer else plain
    return build_optimizer(config.optim, method, fsdp.ShardOptimizer if fsdp.is_sharded(method) else make)


class Pretraining:
    """The task of `train.engine.loop`: a method's update with the batch, draws and learning rate of a step."""

    def __init__(
        self, config: Config, world: World, plan: RunPlan, method: Method, optimizer: torch.optim.Optimizer
    ) -> None:
        self.method, self.optimizer, self.world, self.plan, self.config = method, optimizer, world, plan, config
        graphs = config.run.cuda_graphs  # skipped where a step's number goes in: each would be recorded anew
        options: Any = {"triton.cudagraphs": graphs, "triton.cudagraph_skip_dynamic_graphs": graphs}
        compiled: Any = torch.compile(method, options=options) if config.run.compile or graphs else method
        teachers = [p for teacher, _ in method.teachers() for p in teacher.parameters()]
        averaged = [*(p for p in method.parameters() if p.requires_grad), *teachers]
        self.communication = Communication(compiled, world, config.run, averaged)
        optimizer.register_step_post_hook(self.communication.average)
        self.step = TrainStep(
            method,
            self.communication.module,
            optimizer,
            automatic.dtype(config, world),
            micro_batch_size=config.run.micro_batch_size,
            clip_norm=config.optim.clip_norm,
        )
        batch = config.run.global_batch_size
        part = config.run.micro_batch_size or batch // world.size
        self._noise = NoiseScale(method, batch, part, world.size) if config.run.noise_scale else None

    def __call__(self, batch: Batch, step: int) -> Loss:
        draws = Draws(self.config.run.seed, step, batch.ids)
        labels = batch.labels if self.method.takes_labels else None
        for _ in range(self.communication.settling):
            self.step.settle(batch.views, draws, labels)
            if self._noise:
                self._noise.forget()
        self.communication.begin(step)
        momentum = self.plan.moving("momentum", step)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.plan.moving("weight_decay", step) if group["adapt"] else 0.0
            group |= {"betas": (momentum, group["betas"][1])} if "betas" in group else {"momentum": momentum}
        rate, progress = self.plan.learning_rate(step), (step + 1) / self.plan.total_steps
        twice = self.world if self.config.run.replay_every and step % self.config.run.replay_every == 0 else None
        loss = self.step(batch.views, draws, rate, progress, labels, twice)
        noise = self._noise(loss.metrics["gradient_norm"], 2 if twice else 1) if self._noise else {}
        return loss._replace(metrics=loss.metrics | noise)

    def full_state(self, step: int) -> checkpoint.State | None:
        """All that updates after ``step`` depend on, on rank 0, None on the others. With ``run.sharded_checkpoints``
        shards are written, and their places are in it. Synchronises ranks."""
        run = self.config.run
        folder = checkpoint.unfinished(run.dir, step) if run.sharded_checkpoints else None
        state = self.communication.full_state(self.method, self.optimizer, folder)
        return state and state | {"scaler": self.step.scaler.state_dict()}

    def load(self, state: checkpoint.State) -> None:
        """What `full_state` gave, on every rank what `handed_out` made of it."""
        fsdp.load(self.method, state["method"])
        restore(self.optimizer, state["optimizer"])
        self.communication.load(state)
        if self.step.scaler.is_enabled() and state.get("scaler"):
            self.step.scaler.load_state_dict(state["scaler"])


@dataclass
class Log:
    """Shows and records the averages over ranks every ``run.log_every`` steps, and at the end; says when embeddings
    have collapsed."""

    task: Pretraining
    loader: Loader
    clock: Clock
    monitor: Monitor | None
    online: Online | None
    watch: health.Watch
    sign: str | None = None  # of collapse, in the record before

    def __call__(self, state: StepDone) -> None:
        if self.monitor:
            self.monitor.advance(state.done)
        if state.done % self.task.config.run.log_every and not state.last:
            return
        self.task.step.check(self.task.config.run.dir, self.task.world)  # waits: what follows is not training
        with self.clock.pausing():
            named = {"loss": state.loss.value, **state.loss.metrics}
            named |= health.measure(self.task.method, state.loss, self.task.world)
            named |= self.online.measure(state) if self.online else {}
            values = self.task.world.mean(torch.stack([value.float() for value in named.values()])).tolist()
        if self.monitor:
            record = dict(zip(named, values, strict=True))
            record |= critical_batch_size(record) | {"learning_rate": self.task.plan.learning_rate(state.done - 1)}
            record |= self._collapse(state.done, record)
            self.monitor.log(state.done, record, self.loader.stats(), self.clock.pause_seconds)

    def _collapse(self, step: int, record: dict[str, Any]) -> dict[str, str]:
        before, self.sign = self.sign, self.watch(record)
        if self.sign and not before:
            log.warning("step %d: %s; docs/troubleshooting.md says what to try", step, self.sign)
        return {"collapse": self.sign} if self.sign else {}


@dataclass
class Save:
    """Has a checkpoint written every ``run.checkpoint_every`` steps, and at the end. The loop waits for the copy, or
    until all shards are written."""

    task: Pretraining
    clock: Clock
    writer: checkpoint.Writer | None
    identity: dict[str, Any]
    online: Online | None

    def __call__(self, state: StepDone) -> None:
        if state.done % self.task.config.run.checkpoint_every and not state.last:
            return
        self.task.step.check(self.task.config.run.dir, self.task.world)
        with self.clock.pausing():
            tensors = self.task.full_state(state.done)
            if self.writer and tensors:
                tensors |= {"online": self.online.state_dict()} if self.online else {}
                tensors |= {"identity": self.identity, "config": self.task.config.model_dump(mode="json")}
                self.writer.save(state.done, tensors | {"step": state.done})


def build_loader(config: Config, shards: ShardSet, world: World, start_step: int, order: Order | None = None) -> Loader:
    return Loader(
        shards,
        config.views,
        seed=config.run.seed,
        global_batch_size=config.run.global_batch_size,
        order=order,
        rank=world.rank,
        world_size=world.size,
        start_step=start_step,
        window=config.data.window,
        dtype=automatic.dtype(config, world),
        **reading(config.data, world),
    )


def _online(
    config: Config, shards: ShardSet, method: Method, world: World, state: checkpoint.State | None
) -> Online | None:
    """As it was saved; anew where the checkpoint has none."""
    if not config.run.online or not has_labels(shards):
        return None
    online = Online(method.encoder.num_features, len(shards.manifest.class_names), config.run.log_every, world)
    if state and "online" in state:
        online.load_state_dict(state["online"])
    return online


def reading(data: DataConfig, world: World) -> dict[str, Any]:
    """How images are read, as options of a `Loader`."""
    share = data.cache_bytes // automatic.processes_on_node()
    return {
        "backend": data.backend,
        "canary_every": data.canary_every,
        "num_threads": automatic.num_threads(data.num_threads),
        "prefetch": data.prefetch,
        "max_replaced_samples": data.max_replaced_samples,
        "cache": CacheOptions(data.cache_dir, data.cache_bytes, share) if data.cache_dir else None,
        "device": world.device,
    }


def run_facts(config: Config, shards: ShardSet, start_step: int) -> dict[str, object]:
    """All that the ranks must agree on; where data lie and with how many threads they are read may differ."""
    facts: dict[str, object] = {"the fingerprint of data.shards": shards.manifest.fingerprint}
    facts |= {"the step to start at": start_step, "the source code (its checksum)": automatic.code_version()}
    facts |= dict(leaves(config.model_dump(mode="json")))
    for name in ("data.shards", "data.cache_dir", "data.num_threads", "run.dir"):
        del facts[name]
    return facts


def _resumed(config: Config, identity: dict[str, Any]) -> checkpoint.State | None:
    if not config.run.resume and checkpoint.checkpoints(config.run.dir):
        raise UserError(f"run.dir: {config.run.dir} holds checkpoints and run.resume is false; choose a new run.dir")
    state = checkpoint.load_latest(config.run.dir)
    if state:
        checkpoint.check_identity(state, identity, config.run.dir)
    return state


def _introduce(task: Pretraining, state: checkpoint.State | None) -> None:
    config, piece = task.config, task.config.run.micro_batch_size
    (config.run.dir / "config.yaml").write_text(config.to_yaml())
    print(f"settings that are not the defaults (all of them: {config.run.dir / 'config.yaml'}):")
    print(config.differences() or "none")
    print(f"derived: {task.plan}")
    has_norm = any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in task.method.modules())
    if has_norm and piece and piece * task.world.size < config.run.global_batch_size:
        print(f"BatchNorm has the statistics of pieces of {piece} images a process, not of the batch (docs/design.md)")
    if state:
        print(f"continuing at step {state['step']} of {task.plan.total_steps}")
        for change in checkpoint.changed_settings(state, config):
            print(f"from here on {change}")


def _record_start(config: Config, shards: ShardSet, start_step: int, plan: RunPlan, processes: int) -> None:
    counts = {"start_step": start_step, "total_steps": plan.total_steps, "processes": processes}
    versions = {"data": shards.manifest.fingerprint, "code": automatic.code_version(), **automatic.environment()}
    with (config.run.dir / automatic.PROVENANCE).open("a") as file:
        file.write(json.dumps(counts | versions) + "\n")


def _nothing_to_do(config: Config, step: int, plan: RunPlan, world: World) -> int:
    world.barrier()
    if world.is_main:
        print(f"{config.run.dir}: step {step} is done, and the run is to have {plan.total_steps}; nothing to do")
    return step


def _say_goodbye(config: Config, done: int, plan: RunPlan) -> None:
    print(f"checkpoints and metrics: {config.run.dir}   as a page: python -m train.report {config.run.dir}")
    if done < plan.total_steps:
        print(f"stopped at step {done} of {plan.total_steps}; the same command continues")
    else:
        print(f"next: python -m train.evaluate --checkpoint {config.run.dir}")


def parser(prog: str, description: str, epilog: str) -> Parser:
    """Of a command that takes the configuration of a run."""
    made = Parser(prog, description, f"All settings with their defaults: python -m train.config.\n{epilog}")
    made.add_argument("--config", type=Path, help="YAML file; see configs/")
    made.add_argument("overrides", nargs="*", metavar="section.field=value", help="e.g. optim.epochs=200 views.size=96")
    return made


if __name__ == "__main__":
    sys.exit(main())
