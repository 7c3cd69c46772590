"""One update: forward, loss, backward, optimizer. Nothing in it waits for the device."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sharding.command import UserError
from train.engine import health
from train.engine.checkpoint import checkpoints
from train.engine.gradcache import Piece, accumulate, grad_cache
from train.engine.repeat import done_twice, undone
from train.methods import Loss, Method, Update
from train.model.draws import Draws
from train.optim.optimizers import acting
from train.processes.distributed import World
from train.processes.fsdp import whole

_PATIENCE = 24  # updates that fp16 refuses in a row: halvings of the scale, which begins at 2^16


class TrainStep:
    """Callable on the views of a batch; returns the loss and the method's metrics as device scalars.

    ``micro_batch_size`` images of this rank pass the network at a time (see `train.engine.gradcache`), or all of them
    where it is None. ``clip_norm`` bounds the gradient's norm.

    A non-finite gradient norm (which averaging over ranks spreads to all of them) stops every further update on the
    device itself; the host learns of it from `check`, which the loop calls whenever it reads the losses anyway. In
    fp16 it refuses one update, and ``scaler`` halves the loss's scale; only `_PATIENCE` of them in a row and one more
    stop the others.
    """

    def __init__(
        self,
        method: Method,
        wrapped: nn.Module,
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype,
        *,
        micro_batch_size: int | None = None,
        clip_norm: float | None = None,
    ) -> None:
        self._method, self._wrapped, self._optimizer, self._dtype = method, wrapped, optimizer, dtype
        self._is_compiled = any(hasattr(module, "_orig_mod") for module in wrapped.modules())
        self._micro_batch_size, self._clip_norm = micro_batch_size, clip_norm
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        device = self._parameters[0].device
        self._device_type = device.type
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self._stopped, self._refused, self._in_a_row = (torch.zeros((), device=device) for _ in range(3))
        self._bad_step, self._bad_here = (torch.zeros((), device=device) for _ in range(2))
        reader: Any = acting(optimizer)
        reader.found_inf = self._refused  # by fused optimizers and LARS
        reader.grad_scale = None

    def __call__(
        self,
        views: list[torch.Tensor],
        draws: Draws,
        learning_rate: float,
        progress: float,
        labels: torch.Tensor | None = None,
        twice: World | None = None,
    ) -> Loss:
        """Update the parameters once; ``progress`` is the fraction of the run finished after this step. Where ``twice``
        is given, forward and backward are done twice and compared on all its ranks: see `train.engine.repeat`."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        batch = Piece(views, draws, labels)
        if twice:
            loss, e = done_twice(self._method, self._backward, batch, twice, not self._is_compiled)
        else:
            loss, e = self._backward(batch)
        self.scaler.unscale_(self._optimizer)
        self.scaler.update()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        if self._clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._clip_norm, norm)
        self._refuse(~norm.isfinite(), draws.step + 1, ~e[0].isfinite().all())
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self._method.after_update(Update(progress, 1 - self._refused, e))
        metrics = {**loss.metrics, "gradient_norm": norm.nan_to_num(0, 0)}
        if self.scaler.is_enabled():
            metrics |= {"loss_scale": self.scaler.scale(torch.ones_like(norm)), "refused": self._refused.clone()}
        return Loss(loss.value.detach(), metrics, health.sample(e[0]), e.h[0].clone())

    def settle(self, views: list[torch.Tensor], draws: Draws, labels: torch.Tensor | None) -> None:
        """To be called before the first update by DDP, which puts gradients into buckets anew after its first backward.
        Where in a bucket one lies decides in which order ranks are added, and with three or more how a sum is rounded:
        a run that continues would not be the whole one to the bit. So the first backward is for nothing."""
        with undone(self._method):
            self._backward(Piece(views, draws, labels))

    def _refuse(self, bad: torch.Tensor, step: int, here: torch.Tensor) -> None:
        """Sets the flags of an update whose gradient is ``bad``, or which comes after the last one; ``here``: whether
        this rank's embeddings are bad too."""
        self._in_a_row.copy_(torch.where(bad, self._in_a_row + 1, 0))
        stops = self._in_a_row > (_PATIENCE if self.scaler.is_enabled() else 0)
        for noted, value in ((self._bad_step, step), (self._bad_here, here)):
            noted.copy_(torch.where(stops & (self._stopped == 0), value, noted))
        self._stopped.copy_(torch.maximum(self._stopped, stops.to(self._stopped.dtype)))
        self._refused.copy_(torch.maximum(self._stopped, bad.to(self._stopped.dtype)))

    def check(self, directory: Path, world: World) -> None:
        """Raises UserError on all ranks if updates have stopped on any. Waits for the device, and
        synchronises ranks."""
        flags = world.gather(torch.stack([self._stopped, self._bad_step, self._bad_here])).view(-1, 3).tolist()
        if stopped := [int(step) for is_stopped, step, _ in flags if is_stopped]:
            ranks = [rank for rank, (*_, is_bad) in enumerate(flags) if is_bad]
            found = checkpoints(directory)
            where = f"continue from {found[-1]}" if found else f"no checkpoint is in {directory} yet; start again"
            raise UserError(
                f"the gradient norm became NaN or infinite at step {min(stopped)}; no update was made since; embeddings"
                f" did so on {f'ranks {ranks}' if ranks else 'no rank'}; {where} with a lower optim.learning_rate, a "
                "longer optim.warmup_epochs, optim.clip_norm=1 or run.precision=fp32; its images: python -m "
                f"train.replay {directory} --step {min(stopped)}"
            )

    def _backward(self, batch: Piece) -> tuple[Loss, Any]:
        images = len(batch.draws.ids)
        size = self._micro_batch_size or images
        by_pieces = grad_cache if size < images and self._method.images_meet else accumulate
        return by_pieces(
            self._method, self._forward, getattr(self._wrapped, "no_sync", nullcontext), batch, size, self.scaler.scale
        )

    def _forward(self, views: list[torch.Tensor], draws: Draws) -> Any:
        """The method's, in mixed precision; what it returns is at least float32, because losses sum over many images
        and gradients of gathered embeddings over ranks."""
        with torch.autocast(self._device_type, self._dtype, enabled=self._dtype in (torch.bfloat16, torch.float16)):
            made = self._wrapped(views, draws)
        return type(made)(*(t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in made))
