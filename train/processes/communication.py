"""What ranks send each other in an update, beside what the loss gathers: gradients, by DDP's hooks, or weights."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from pipeline.settings import Settings
from train.processes.distributed import World

log = logging.getLogger(__name__)

State = dict[str, Any]

# Of processes: each alone (local), those of a machine, all, or so many of consecutive ranks.
Over = Annotated[str, Field(pattern=r"^(local|node|global|[1-9]\d*)$", coerce_numbers_to_str=True)]

_FIRST = 2  # iteration of PowerSGDState that may compress
_MEMORY = ("error_dict", "p_memory_dict", "q_memory_dict")  # of PowerSGDState: by bucket


class ParallelConfig(Settings):
    """The fields of ``run`` that say how processes work together."""

    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="fsdp: each process has a share of parameters, gradients and optimizer (FSDP2)"
    )
    sharded_checkpoints: bool = Field(
        False, description="with fsdp: each process writes its own share (DCP), and no host holds the whole state then"
    )
    gradient_compression: Literal["none", "bf16", "fp16", "powersgd"] = Field(
        "none", description="how gradients are sent: in a shorter dtype, or as matrices of low rank"
    )
    powersgd_rank: int = Field(1, ge=1, description="rank of PowerSGD's matrices")
    powersgd_start: int = Field(1000, ge=0, description="first step that PowerSGD compresses; at least the warm-up's")
    local_sgd_period: int = Field(0, ge=0, description="post-local SGD: steps between averages of weights; 0: none")
    local_sgd_start: int = Field(1000, ge=0, description="first step whose gradients stay in their group of processes")
    local_sgd_group: Over = Field("node", description="that averages gradients all along: as of batchnorm")
    bucket_mb: int = Field(25, ge=1, description="gradients that DDP sends together, in MiB")
    static_graph: bool = Field(False, description="tell DDP that every step uses the same parameters in one order")
    shard_optimizer: bool = Field(False, description="each process has the optimizer's state of a share only (ZeRO-1)")


class Communication:
    """Wraps a module, so that gradients, or weights, are averaged over ranks as configured. ``module`` is to be called,
    and ``averaged`` are the tensors that have to be equal on all ranks.

    PowerSGD (Vogels et al., 2019, algorithm 2) keeps what it did not send for the next step: state of a rank alone.

    Post-local SGD (Lin et al., "Don't use large mini-batches, use local SGD", 2020): from a step on, gradients are
    averaged within groups of ranks only, and every so many steps weights over all. In between all state is a rank's.
    """

    def __init__(
        self, module: nn.Module, world: World, config: ParallelConfig, averaged: Sequence[torch.Tensor] = ()
    ) -> None:
        self._world, self._config, self._averaged, self._step = world, config, averaged, 0
        kind, self._power, self._local = config.gradient_compression, None, None
        options = {"static_graph": config.static_graph}
        options["init_sync"] = not config.local_sgd_period  # which would give all ranks the weights of the first
        self.module = world.wrap(module, bucket_cap_mb=config.bucket_mb, **options)
        self.settling = 0  # times that `TrainStep.settle` is to be called before `begin`: a static graph takes one more
        if not isinstance(self.module, DistributedDataParallel):
            return
        self.settling = 1 + config.static_graph
        if config.local_sgd_period:
            size, name = world.group_size(config.local_sgd_group), "run.local_sgd_group"
            group = None if size == 1 else world.subgroup(size, name) or dist.group.WORLD
            self._local = PostLocalSGDState(None, group, config.local_sgd_start, size > 1)
            self.module.register_comm_hook(self._local, post_localSGD_hook)
        elif kind == "powersgd":
            self._power = PowerSGDState(None, config.powersgd_rank, start_powerSGD_iter=_FIRST)
            self.module.register_comm_hook(self._power, _in_turn)
        elif kind != "none":
            self.module.register_comm_hook(None, getattr(default_hooks, f"{kind}_compress_hook"))

    def begin(self, step: int) -> None:
        """To be called before each update: its number decides which phase it is in."""
        self._step, self.settling = step, 0
        if self._power:
            self._power.iter = step - self._config.powersgd_start + _FIRST
        if self._local:
            self._local.iter = step

    @torch.no_grad()
    def average(self, *_: Any) -> None:
        """To be called after the optimizer's step: post-local SGD's average, where it is due. Torch's own would make
        weights contiguous that are channels_last, and leave out teachers."""
        count = self._step + 1 - self._config.local_sgd_start
        if self._local and count > 0 and count % self._config.local_sgd_period == 0:
            flat = self._world.mean(torch.cat([tensor.flatten() for tensor in self._averaged]))
            for tensor, mean in zip(self._averaged, flat.split([t.numel() for t in self._averaged]), strict=True):
                tensor.copy_(mean.view_as(tensor))

    def full_state(self, method: nn.Module, optimizer: torch.optim.Optimizer, folder: Path | None) -> State | None:
        """`World.full_state`, and in "ranks" what each rank has that others do not; the weights are then the averages.
        Synchronises ranks."""
        own, full = dict[str, Any](), self._world.full_state(method, optimizer, folder)
        if self._power and self._power.error_dict:
            own = {"powersgd": {name: getattr(self._power, name) for name in _MEMORY}}
        if self._local and self._step >= self._config.local_sgd_start:
            own = {"method": method.state_dict(), "optimizer": optimizer.state_dict()}
            means = {n: self._world.mean(t) if t.is_floating_point() else t for n, t in own["method"].items()}
            full = full and full | {"method": means}
        ranks = self._world.collect(own) if own else None
        if full and ranks:
            full["ranks"] = {"settings": _settings(self._world, self._config), "states": dict(enumerate(ranks))}
        return full

    def load(self, state: State) -> None:
        """What `handed_out` gave this rank, but for the method's and the optimizer's."""
        for name, tensors in state.get("powersgd", {}).items():
            setattr(self._power, name, {bucket: tensor.to(self._world.device) for bucket, tensor in tensors.items()})


def handed_out(state: State | None, world: World, config: ParallelConfig) -> State | None:
    """`full_state` from rank 0 to all, to each with its own part of "ranks". Where processes or settings are others now
    that means nothing: it is left out, and rank 0 says so. Synchronises ranks."""
    ranks, settings = state.pop("ranks", None) if state else None, _settings(world, config)
    fits = ranks is not None and ranks["settings"] == settings
    if ranks and not fits:
        log.warning("what processes had of their own is left out: it is of %s, now %s", ranks["settings"], settings)
    state, own = world.broadcast(state), world.scatter(list(ranks["states"].values()) if ranks and fits else None)
    return state and state | (own or {})


def _settings(world: World, config: ParallelConfig) -> State:
    """What that which a rank has of its own depends on."""
    names = ("gradient_compression", "powersgd_rank", "bucket_mb", "local_sgd_period", "local_sgd_group")
    return {"processes": world.size} | {f"run.{name}": getattr(config, name) for name in names}


def _in_turn(state: PowerSGDState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """PowerSGD's hook. Its three collectives follow each other by callbacks, which gloo runs on threads of its own: of
    several buckets in another order on each rank. So there a bucket waits for the one before."""
    future = powerSGD_hook(state, bucket)
    if bucket.buffer().device.type == "cpu":
        future.wait()
    return future
