"""How large a batch pays: the gradient noise scale."""

import torch
from torch import nn

from sharding.command import UserError


class NoiseScale:
    """The simple noise scale of McCandlish et al., "An empirical model of large-batch training", 2018, appendix A.1.

    Gradients of the parts of a batch (a process's images, or its micro batches) are longer than that of the whole. From
    both lengths follow tr(Sigma), the variance of an image's gradient, and the squared length of the true gradient,
    without bias. Each is averaged over updates, exponentially, with a memory of ``1 / (1 - decay)`` of them. Where
    images meet in the loss, an image's gradient is its share of the batch's, the others held fixed.
    """

    def __init__(self, module: nn.Module, batch: int, part: int, world_size: int, decay: float = 0.99) -> None:
        if part == batch:
            raise UserError(
                "run.noise_scale: expected a batch in parts, found one process that takes it whole; start more, or set "
                f"run.micro_batch_size={batch // 2}"
            )
        self._batch, self._part, self._decay, self._updates = batch, part, decay, 0
        self._num_pieces = batch // world_size // part
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._add)  # with the gradient of a backward pass, before DDP averages it
        self._squares: list[torch.Tensor] = []
        self._averages = torch.zeros(2)

    def forget(self) -> None:
        """The backward passes since the last batch."""
        self._squares.clear()

    def _add(self, gradient: torch.Tensor) -> None:
        self._squares.append(torch.linalg.vector_norm(gradient).square())

    def __call__(self, norm: torch.Tensor, times: int = 1) -> dict[str, torch.Tensor]:
        """After a batch, done so many ``times``, whose averaged gradient has this norm: device scalars, to be averaged
        over ranks."""
        whole, part = norm.square(), self._num_pieces * torch.stack(self._squares).sum() / times
        self.forget()
        noise = (part - whole) / (1 / self._part - 1 / self._batch)
        signal = (self._batch * whole - self._part * part) / (self._batch - self._part)
        self._updates += 1
        share = max(1 - self._decay, 1 / self._updates)
        self._averages = torch.lerp(self._averages.to(noise), torch.stack([noise, signal]), share)
        return {"gradient_noise": self._averages[0], "gradient_signal": self._averages[1]}


def critical_batch_size(metrics: dict[str, float]) -> dict[str, float]:
    """tr(Sigma) / |G|^2 of values averaged over ranks, where that of |G|^2 is positive: the batch size whose updates
    make half the progress of those by the true gradient."""
    signal = metrics.get("gradient_signal", 0.0)
    return {"critical_batch_size": metrics["gradient_noise"] / signal} if signal > 0 else {}
