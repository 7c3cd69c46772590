"""Optimizers: torch's SGD and AdamW, and LARS as SimCLR uses it.

All of them take ``found_inf``, a device tensor set by the train step: where it is not zero, the update leaves
parameters and state as they are, without the host being asked.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.optim.sgd import sgd

from pipeline.settings import Settings


class OptimConfig(Settings):
    name: Literal["lars", "sgd", "adamw"] = "lars"
    learning_rate: float = Field(0.3, gt=0, description="peak is this x B/256 (linear) or x sqrt(B) (sqrt)")
    scaling: Literal["linear", "sqrt"] = "linear"
    weight_decay: float = Field(1e-6, ge=0, description="not on biases and BatchNorm")
    momentum: float = Field(0.9, ge=0, lt=1, description="of LARS and SGD; beta_1 of AdamW")
    eta: float = Field(0.001, gt=0, description="LARS: trust coefficient; 0.02 on small data sets")
    clip_norm: float | None = Field(None, gt=0, description="scale gradients of a larger norm down to this one")
    epochs: float = Field(100, gt=0, description="passes over the data; the run ends at the next whole step")
    steps: int | None = Field(None, ge=1, description="updates of the run, instead of epochs")
    warmup_epochs: float = Field(10, ge=0, description="linear warm-up; cut to a tenth of a run given in steps")

    @model_validator(mode="after")
    def _check(self) -> "OptimConfig":
        if self.steps is None and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs: expected less than the {self.epochs:g} optim.epochs, found {self.warmup_epochs:g}; "
                f"set optim.warmup_epochs={self.epochs / 10:g}, for example"
            )
        return self


def build_optimizer(config: OptimConfig, module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of all trainable parameters; one-dimensional ones (biases, BatchNorm) are neither decayed nor
    adapted. Its learning rate is set by the train step."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay, "adapt": True},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]
    if config.name == "lars":
        return LARS(groups, momentum=config.momentum, eta=config.eta)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.momentum, 0.999), fused=True)


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state but keep the settings of this ``optimizer``: torch would put the saved ones in their place."""
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group |= own


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman & Ginsburg, 2017) as in google-research/simclr.

    ``v <- m v + lr * trust * (g + wd w)``, ``w <- w - v``, with ``trust = eta |w| / |g + wd w|`` where ``adapt`` is set
    and both norms are positive, else 1. The learning rate is inside the momentum buffer, which matters while it moves.
    """

    _step_supports_amp_scaling = True

    def __init__(self, params: Any, *, lr: float = 0.0, momentum: float = 0.9, eta: float = 0.001) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "eta": eta, "weight_decay": 0.0, "adapt": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("LARS.step takes no closure")
        for group in self.param_groups:
            params: list[torch.Tensor] = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        """The gradients serve as memory for the update; torch's fused SGD applies it, or leaves all as it is."""
        gradients = [p.grad for p in params if p.grad is not None]
        if group["weight_decay"]:
            torch._foreach_add_(gradients, params, alpha=group["weight_decay"])
        if group["adapt"]:
            torch._foreach_mul_(gradients, self._trust(params, gradients, group["eta"]))
        torch._foreach_mul_(gradients, group["lr"])
        sgd(
            params,
            gradients,
            [self._buffer(p) for p in params],
            fused=True,
            found_inf=getattr(self, "found_inf", None),
            weight_decay=0.0,
            momentum=group["momentum"],
            lr=1.0,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )

    @staticmethod
    def _trust(params: list[torch.Tensor], gradients: list[torch.Tensor], eta: float) -> list[torch.Tensor]:
        w, g = (torch.stack(torch._foreach_norm(tensors)) for tensors in (params, gradients))
        return list(torch.where((w > 0) & (g > 0), eta * w / g, 1.0).unbind())

    def _buffer(self, parameter: torch.Tensor) -> torch.Tensor | None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: torch.Tensor = state["momentum_buffer"]
        return buffer
