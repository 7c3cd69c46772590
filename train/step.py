"""One update: forward, loss, backward, optimizer. Nothing in it waits for the device."""

from contextlib import AbstractContextManager

import torch
from torch import nn

from sharding.command import UserError
from train.methods import Method


class NonFiniteGradientError(UserError):
    """The gradient of a step has NaN or infinite values; the parameters are those before that step."""


class TrainStep:
    """Callable on the views of a batch; returns the loss and the method's metrics as device scalars.

    A non-finite gradient norm (which averaging over ranks spreads to all of them) stops every further update on the
    device itself; the host learns of it from `check`, which the loop calls whenever it reads the losses anyway.
    """

    def __init__(
        self, method: Method, wrapped: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype
    ) -> None:
        self._method, self._wrapped, self._optimizer, self._dtype = method, wrapped, optimizer, dtype
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        device = self._parameters[0].device
        self._device_type = device.type
        self._stopped = torch.zeros((), device=device)
        optimizer.found_inf = self._stopped  # type: ignore[attr-defined]  # read by fused optimizers and LARS
        optimizer.grad_scale = None  # type: ignore[attr-defined]

    def __call__(
        self, views: list[torch.Tensor], learning_rate: float, progress: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Update the parameters once; ``progress`` is the fraction of the run finished after this step."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        with self._autocast():
            embeddings = self._wrapped(views)
        loss, metrics = self._method.loss(embeddings)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        self._stopped.copy_(torch.maximum(self._stopped, (~norm.isfinite()).to(self._stopped.dtype)))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._method.after_step(progress)
        return loss.detach(), {**metrics, "gradient_norm": norm}

    def check(self) -> None:
        """Raises `NonFiniteGradientError` if updates have stopped. Waits for the device."""
        if self._stopped.item():
            raise NonFiniteGradientError(
                "the gradient norm became NaN or infinite; no update was made since. Resume from the last checkpoint "
                "with a lower learning rate, a longer warm-up or run.precision=fp32"
            )

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self._device_type, self._dtype, enabled=self._dtype != torch.float32)
