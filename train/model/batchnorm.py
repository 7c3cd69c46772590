"""BatchNorm over the images of several processes, on GPUs by torch's own, on CPU processes by `GlooBatchNorm`."""

from itertools import chain
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import nn

from train.processes.distributed import World
from train.processes.neighbours import Neighbours

Network = TypeVar("Network", bound=nn.Module)


def synchronize_batchnorm(module: Network, world: World, over: str = "global") -> Network:
    """The module with its BatchNorm layers normalising over the global batch, parameters and their names kept.

    ``over`` may also be "local" (the images of a process), "node" (those of a machine) or a number of processes of
    consecutive ranks. On GPUs the layers are `torch.nn.SyncBatchNorm`, which refuses CPU tensors; elsewhere
    `GlooBatchNorm`. timm's layers that have an activation in them keep it. To be called on all ranks. Raises UserError
    where the groups would not be of equal size.
    """
    size = world.group_size(over)
    if world.size == 1 or size == 1:
        return module
    group = world.subgroup(size, f"run.batchnorm={over}")
    if world.device.type == "cuda":
        from timm.layers.norm_act import convert_sync_batchnorm  # torch's own leaves activations out

        return cast(Network, convert_sync_batchnorm(module, group))
    return cast(Network, _with_gloo_batchnorm(module, Neighbours(group)))


def _with_gloo_batchnorm(module: nn.Module, neighbours: Neighbours) -> nn.Module:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        layer = GlooBatchNorm(
            module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
        )
        layer.neighbours = neighbours
        own = module.named_parameters(recurse=False), module.named_buffers(recurse=False), module.named_children()
        for name, value in chain(*own):
            setattr(layer, name, value)  # the same ones, with their dtype, and frozen where they are
        return layer.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, _with_gloo_batchnorm(child, neighbours))
    return module


class GlooBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the batches of neighbours on CPU tensors (n, C, ...), with equally many values on each; then what
    timm's `BatchNormAct2d` has in it: a dropout and an activation."""

    neighbours: Neighbours

    def _check_input_dim(self, input: torch.Tensor) -> None:  # noqa: A002  # the base class's name
        if input.ndim < 2:
            raise ValueError(f"GlooBatchNorm: expected (n, C, ...), found shape {tuple(input.shape)}")

    @torch.compiler.disable  # its messages are not to be traced
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = _BatchNormFunction.apply(x, *self._scale(x), self) if self.training else super().forward(x)
        for child in self.children():
            y = child(y)
        return y

    def _scale(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias: ones and zeros where the layer has none."""
        if self.affine:
            return self.weight, self.bias
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.ones(x.shape[1], dtype=dtype), torch.zeros(x.shape[1], dtype=dtype)

    def track(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """As BatchNorm: an exponential average, or that of all batches where the momentum is None."""
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, share)  # type: ignore[union-attr]
            self.running_var.lerp_(variance, share)  # type: ignore[union-attr]


class _BatchNormFunction(torch.autograd.Function):
    """Ioffe & Szegedy, 2015, section 3, with statistics and sums of gradients taken over all neighbours.

    Arithmetic on vectors of C values is NumPy's, which takes a third of the time for them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, layer: GlooBatchNorm
    ) -> torch.Tensor:
        # What `native_batch_norm` sums with; on channels_last tensors 14 times as fast as `torch.var_mean`.
        own = torch.batch_norm_update_stats(x if x.dtype == torch.float64 else x.float(), None, None, 0.0)
        gathered = layer.neighbours.gather(*(vector.numpy() for vector in own))
        count = x.numel() // x.shape[1] * len(gathered)
        mean, variance = gathered.sum(0) / len(gathered)
        variance += ((gathered[:, 0] - mean) ** 2).sum(0) / len(gathered)
        statistics = torch.from_numpy(mean), torch.from_numpy(variance)
        layer.track(statistics[0], torch.from_numpy(variance * (count / (count - 1))))
        ctx.save_for_backward(x, weight, *statistics)
        ctx.layer, ctx.count = layer, count
        return torch.batch_norm(x, weight, bias, *statistics, False, 0.0, layer.eps, False)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        # The local sums are the gradients of weight and bias, which DDP averages.
        _, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, variance, None, None, False, ctx.layer.eps, [False, True, True]
        )
        sums = ctx.layer.neighbours.gather(d_weight.numpy(), d_bias.numpy()).sum(0)
        inverse_std = 1 / np.sqrt(variance.numpy() + ctx.layer.eps)
        scale = weight.detach().clone().numpy() * inverse_std  # FSDP cannot resize a storage that NumPy has seen
        by_weight, by_bias = sums * (scale / -ctx.count)
        slope = by_weight * inverse_std
        vectors = scale, slope, by_bias - slope * mean.numpy()
        shape = (1, -1, *[1] * (x.ndim - 2))
        scale, slope, offset = (torch.from_numpy(vector.reshape(shape)) for vector in vectors)
        # Two passes over the tensors, as many as of a BatchNorm of one process.
        d_x = torch.addcmul(offset, x, slope).addcmul_(gradient, scale).to(x.dtype)
        return d_x, d_weight, d_bias, None
