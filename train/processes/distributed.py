"""Processes: who they are, gathers, averages, agreement, and how all of them end when one fails.

Gradient convention: each rank's loss is the mean over its own anchors, `World.gather` passes gradients back to the
rank that a row came from, and DDP averages over ranks. The result is the single-process gradient of the global batch.
"""

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import PrefixStore, TCPStore, rendezvous  # type: ignore[attr-defined]
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from sharding.command import UserError
from train.processes.failure import Failures
from train.processes.fsdp import ShardOptimizer, is_sharded, whole, write

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the others. ``World()`` is a single process without any group.

    ``control`` is a group of the hosts, apart from the devices': what is sent over it waits for no device.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # a device is immutable
    control: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0

    def gather(self, rows: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """All ranks' ``rows``, concatenated along ``dim`` in the order of ranks, with gradient. Synchronises ranks."""
        if self.size == 1:
            return rows
        gathered: torch.Tensor = _Gather.apply(rows.movedim(dim, 0))
        return gathered.movedim(0, dim)

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, without gradient. Synchronises ranks."""
        value = value.detach().clone()
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The average over ranks, without gradient. Synchronises ranks."""
        return self.total(value) / self.size

    def broadcast(self, value: T) -> T:
        """Rank 0's ``value`` (anything that can be pickled) on every rank. Synchronises ranks."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, group=self.control)
        return values[0]

    def gather_objects(self, value: T) -> list[T]:
        """All ranks' ``value`` (anything that can be pickled), in the order of ranks. Synchronises ranks."""
        everyone = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(everyone, value, group=self.control)
        return everyone

    def collect(self, value: T) -> list[T] | None:
        """All ranks' ``value`` (anything that can be pickled) on rank 0, None on the others. Synchronises ranks."""
        everyone = [value] * self.size if self.is_main else None
        if self.size > 1:
            dist.gather_object(value, everyone, group=self.control)
        return everyone

    def scatter(self, values: list[T] | None) -> T | None:
        """To each rank its own of rank 0's ``values``, or None to all. Synchronises ranks."""
        if self.size == 1:
            return values[0] if values else None
        own: list[Any] = [None]
        dist.scatter_object_list(own, (values or [None] * self.size) if self.is_main else None, group=self.control)
        return own[0]

    def require_agreement(self, facts: Mapping[str, object]) -> None:
        """Raises UserError on every rank unless all have the same ``facts``; it names the fact and two ranks."""
        everyone = self.gather_objects(dict(facts))
        for name in sorted(everyone[0].keys() | facts.keys()):
            found = [theirs.get(name) for theirs in everyone]
            for rank, value in enumerate(found):
                if value != found[0]:
                    raise UserError(
                        f"the ranks disagree on {name}: rank 0 has {found[0]!r}, rank {rank} has {value!r}; start all "
                        "processes with the same command and the same code"
                    )

    def full_state(
        self, method: nn.Module, optimizer: torch.optim.Optimizer, folder: Path | None = None
    ) -> dict[str, Any] | None:
        """The state of both on rank 0, None on the others. To be called on all ranks: it may be gathered, or, where
        there is a ``folder``, shards be written there: see `fsdp.write`."""
        if isinstance(optimizer, ZeroRedundancyOptimizer):
            optimizer.consolidate_state_dict()
        if isinstance(optimizer, ShardOptimizer):
            shards = {"method": method.state_dict(), "optimizer": optimizer.state_dict()}
            state = write(shards, folder, self.control) if folder else whole(shards)
            return state if self.is_main else None
        return {"method": method.state_dict(), "optimizer": optimizer.state_dict()} if self.is_main else None

    def shard(self, kind: type[torch.optim.Optimizer], groups: Any, **options: Any) -> torch.optim.Optimizer:
        """An optimizer of which each rank has the state of its share of the parameters, which it updates and sends to
        the others: ZeRO's first stage (Rajbhandari et al., 2020). To be called on all ranks."""
        return kind(groups, **options) if self.size == 1 else ZeroRedundancyOptimizer(groups, kind, **options)

    def group_size(self, over: str) -> int:
        """Of the group that this process is in: "local", "node" (the processes of a machine), "global", or a number."""
        named = {"local": 1, "node": int(os.environ.get("LOCAL_WORLD_SIZE", "0")), "global": self.size}
        return named[over] if over in named else int(over)

    def subgroup(self, size: int, name: str) -> Any:
        """The group of ``size`` consecutive ranks that this one is in, or None for that of all. Synchronises ranks.

        Raises UserError, about the setting ``name``, unless ``size`` divides the number of processes.
        """
        if size < 1 or self.size % size:
            raise UserError(f"{name}: expected groups of a divisor of the {self.size} processes, found {size}")
        return None if size == self.size else dist.new_subgroups(group_size=size)[0]

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.size > 1:
            dist.barrier()

    def wrap(self, module: nn.Module, **options: Any) -> nn.Module:
        """The module with gradients averaged over ranks, by DDP with these ``options`` of its own."""
        if self.size == 1 or is_sharded(module):
            return module
        ids = [self.device] if self.device.type == "cuda" else None
        wrapped = DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True, **options)
        wrapped.broadcast_buffers = False  # they stay equal; a queue would be sent each step
        return wrapped


class AnyRank:
    """Whether a flag was set on any rank at the call before: an answer that nobody has to wait for.

    Each call sends this rank's flag and returns what all ranks' were at the last call; a single process is told at
    once. To be called by all ranks at the same steps.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def __call__(self, flag: bool) -> bool:
        if self._world.size == 1:
            return flag
        before, count = self._pending, torch.tensor(int(flag))
        self._pending = dist.all_reduce(count, group=self._world.control, async_op=True), count
        if before is None:
            return False
        before[0].wait()
        return bool(before[1])


@contextmanager
def session(command: str) -> Iterator[World]:
    """The world that `torchrun` describes in the environment, else a single process.

    An error within the block ends all ranks of ``command``, each with a line: see `train.processes.failure`. The group
    is destroyed at the end of the block, but not after an error: NCCL would first wait for collectives that the other
    ranks never join.
    """
    given = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} | os.environ
    rank, size, local_rank = (int(given[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = _device(local_rank)
    if size == 1:
        yield World(device=device)
        return
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    # Under --max-restarts torchrun's store still has the addresses and the failures of those who met there before.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"attempt {attempt}", next(rendezvous("env://"))[0])
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, device_id=device_id)
    failures = Failures(command, dist.distributed_c10d._get_default_store(), rank, size)
    with failures.watched():
        yield World(rank, size, device, dist.new_group(backend="gloo"))
    dist.destroy_process_group()


def launch(command: Sequence[str], num_processes: int) -> int:
    """Run ``command`` in so many processes on this machine, which meet in `session`; 0 if all of them end with 0."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a free port, as torchrun's
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    meeting |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    environments = [{**os.environ, **meeting, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(num_processes)]
    processes = [subprocess.Popen(command, env=environment) for environment in environments]
    return max(abs(process.wait()) for process in processes)


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"--nproc_per_node: expected at most one process per GPU, of which there are "
            f"{torch.cuda.device_count()}, found local rank {local_rank}"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.contiguous()  # and with them `empty_like`: NCCL fills memory, whatever its strides mean
        ctx.num_rows = len(rows)
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        """Every rank's gradient with respect to this rank's rows, summed."""
        theirs = list(gradients[0].contiguous().split(ctx.num_rows))
        own = torch.empty_like(theirs[0])
        dist.reduce_scatter(own, theirs)
        return own
