"""The only file that talks to `torch.distributed`: processes, gathers, averages, and synchronised BatchNorm.

Gradient convention: each rank's loss is the mean over its own anchors, `World.gather` passes gradients back to the
rank that a row came from, and DDP averages over ranks. The result is the single-process gradient of the global batch.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sharding.command import UserError


@dataclass(frozen=True)
class World:
    """This process among the others. ``World()`` is a single process without any group."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # a device is immutable

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, rows: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """All ranks' ``rows``, concatenated along ``dim`` in the order of ranks, with gradient. Synchronises ranks."""
        if self.size == 1:
            return rows
        gathered: torch.Tensor = _Gather.apply(rows.movedim(dim, 0))
        return gathered.movedim(0, dim)

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The average over ranks, without gradient. Synchronises ranks."""
        value = value.detach().clone()
        if self.size > 1:
            dist.all_reduce(value)
        return value / self.size

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Synchronises ranks and, on a GPU, the host."""
        return bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over ranks."""
        if self.size == 1:
            return module
        ids = [self.device] if self.device.type == "cuda" else None
        wrapped = DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)
        wrapped.broadcast_buffers = False  # they stay equal; a queue's would be sent each step
        return wrapped


@contextmanager
def session() -> Iterator[World]:
    """The world that `torchrun` describes in the environment, else a single process.

    The group ends with the block, but not after an error: NCCL would first wait for collectives that the other ranks
    never join, and `torchrun`, which ends them when this process ends, would wait as well.
    """
    rank, size, local_rank = (int(os.environ.get(name, d)) for name, d in _VARIABLES.items())
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"--nproc_per_node: expected at most one process per GPU, of which there are "
                f"{torch.cuda.device_count()}, found local rank {local_rank}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if size == 1:
        yield World(device=device)
        return
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    yield World(rank, size, local_rank, device)
    dist.destroy_process_group()


_VARIABLES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


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
        """Every rank's gradient with respect to this rank's rows, summed (a reduce-scatter; gloo lacks that call)."""
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total.narrow(0, dist.get_rank() * ctx.num_rows, ctx.num_rows)


def synchronize_batchnorm(module: nn.Module, world: World) -> nn.Module:
    """The module with its BatchNorm layers normalising over the global batch, parameters and their names kept.

    On GPUs these are `torch.nn.SyncBatchNorm`, which refuses CPU tensors; elsewhere `GlooBatchNorm`.
    """
    if world.size == 1:
        return module
    if world.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            layer = GlooBatchNorm(child.num_features, child.eps, child.momentum or 0.1)
            layer.to(child.weight.dtype).load_state_dict(child.state_dict())
            layer.requires_grad_(child.weight.requires_grad)  # a teacher's is not trained
            setattr(module, name, layer)
        else:
            synchronize_batchnorm(child, world)
    return module


class GlooBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the global batch on CPU tensors (n, C, ...), with equally many values on every rank."""

    def _check_input_dim(self, input: torch.Tensor) -> None:  # noqa: A002  # the base class's name
        if input.ndim < 2:
            raise ValueError(f"GlooBatchNorm: expected (n, C, ...), found shape {tuple(input.shape)}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        y, mean, variance, count = _BatchNormFunction.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]  # tracking is always on here
            self.running_mean.lerp_(mean, self.momentum)  # type: ignore[union-attr,arg-type]
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)  # type: ignore[union-attr,arg-type]
        return y


class _BatchNormFunction(torch.autograd.Function):
    """Ioffe & Szegedy, 2015, section 3, with the sums of statistics and gradients taken over all ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
        # What `native_batch_norm` sums with; on channels_last tensors 14 times as fast as `torch.var_mean`.
        mean, variance = torch.batch_norm_update_stats(x if x.dtype == torch.float64 else x.float(), None, None, 0.0)
        both = [mean.new_empty(2, len(mean)) for _ in range(dist.get_world_size())]
        dist.all_gather(both, torch.stack([mean, variance]))
        means, variances = torch.stack(both).unbind(1)
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        count = x.numel() / x.shape[1] * len(both)
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        ctx.eps, ctx.count = eps, count
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        x, weight, mean, inverse_std = ctx.saved_tensors
        gradient = gradients[0]
        variance = inverse_std.pow(-2) - ctx.eps
        # With the statistics held fixed: the local sums are the gradients of weight and bias, which DDP averages.
        direct, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([d_weight, d_bias])
        dist.all_reduce(sums)
        slope = -weight * inverse_std.square() * sums[0] / ctx.count
        offset = -weight * inverse_std * sums[1] / ctx.count - slope * mean
        shape = [1, -1] + [1] * (x.ndim - 2)
        return direct.addcmul_(x, slope.view(shape)).add_(offset.view(shape)), d_weight, d_bias, None
