"""Optimizers: torch's SGD and AdamW, LARS as SimCLR uses it, LARC, and LAMB.

All of them take ``found_inf``, a device tensor set by the train step: where it is not zero, the update leaves
parameters and state as they are, without the host being asked.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from pipeline.settings import Settings
from sharding.command import UserError

Zeros = Callable[[torch.Tensor], torch.Tensor]
Make = Callable[..., torch.optim.Optimizer]

_LARC_EPS = 1e-8  # apex's and solo-learn's
_LAMB_EPS = 1e-6  # the paper's
_TOKENS = {"pos_embed", "cls_token", "reg_token", "dist_token", "mask_token", "mask"}  # timm's names, and MAE's


class OptimConfig(Settings):
    name: Literal["lars", "larc", "lamb", "sgd", "adamw"] = Field("lars", description="larc: LARS with a clipped ratio")
    learning_rate: float = Field(0.3, gt=0, description="peak is this x B/256 (linear) or x sqrt(B) (sqrt)")
    scaling: Literal["linear", "sqrt"] = "linear"
    schedule: Literal["cosine", "constant", "step"] = Field("cosine", description="of the rate, after the warm-up")
    final_learning_rate: float = Field(0.0, ge=0, le=1, description="that the cosine ends at: share of the peak")
    milestones: tuple[float, ...] = Field((0.6, 0.8), description="step: fractions of the run; each divides by 10")
    weight_decay: float = Field(1e-6, ge=0, description="not on what is excluded")
    weight_decay_end: float | None = Field(None, ge=0, description="by a cosine over the run; default: does not move")
    exclude: tuple[Literal["vectors", "tokens"], ...] = Field(
        ("vectors",), description="without decay and adaptation: vectors (biases, norms), tokens (and their positions)"
    )
    excluded_rate: float = Field(1.0, gt=0, description="learning rate of what is excluded: share of the others'")
    momentum: float = Field(0.9, ge=0, lt=1, description="of LARS, LARC and SGD; beta_1 of AdamW and LAMB")
    momentum_end: float | None = Field(None, ge=0, lt=1, description="by a cosine over the run; default: stays")
    nesterov: bool = Field(False, description="SGD: Nesterov's correction of the momentum")
    beta2: float = Field(0.999, ge=0, lt=1, description="of AdamW and LAMB")
    eta: float = Field(0.001, gt=0, description="LARS, LARC: trust coefficient; 0.02 on small data sets")
    clip_norm: float | None = Field(None, gt=0, description="scale gradients of a larger norm down to this one")
    epochs: float = Field(100, gt=0, description="passes over the data; the run ends at the next whole step")
    steps: int | None = Field(None, ge=1, description="updates of the run, instead of epochs")
    warmup_epochs: float = Field(10, ge=0, description="linear warm-up; cut to a tenth of a run given in steps")

    @model_validator(mode="after")
    def _check(self) -> "OptimConfig":
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: expected a momentum above 0, found 0; set nesterov=false")
        if self.steps is None and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs: expected less than the {self.epochs:g} optim.epochs, found {self.warmup_epochs:g}; "
                f"set optim.warmup_epochs={self.epochs / 10:g}, for example"
            )
        return self


def plain(kind: type[torch.optim.Optimizer], groups: Any, **options: Any) -> torch.optim.Optimizer:
    return kind(groups, **options)


def acting(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Which one updates this rank's parameters: of `World.shard`'s that of the rank's share, else itself."""
    chosen: torch.optim.Optimizer = getattr(optimizer, "optim", optimizer)
    return chosen


def build_optimizer(
    config: OptimConfig, module: nn.Module, make: Make = plain, scales: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """The optimizer of all trainable parameters in two groups, of which the second (``config.exclude``) is neither
    decayed nor adapted; two for each of the ``scales`` of the learning rate, by parameter (1 where it has none).
    Learning rates are set by the train step: its own times the group's ``lr_scale``. ``make`` is given its class, the
    groups and options; `World.shard` is one."""
    scales = scales or {}
    named = [(name, p, scales.get(name, 1.0)) for name, p in module.named_parameters() if p.requires_grad]
    groups = []
    for scale in sorted({scale for *_, scale in named}):
        chosen, excluded = (
            [p for n, p, own in named if own == scale and _is_excluded(n, p, config.exclude) == wanted]
            for wanted in (False, True)
        )
        groups += [
            {"params": chosen, "weight_decay": config.weight_decay, "adapt": True, "lr_scale": scale},
            {"params": excluded, "weight_decay": 0.0, "adapt": False, "lr_scale": scale * config.excluded_rate},
        ]
    betas = config.momentum, config.beta2
    if config.name in ("lars", "larc"):
        return make(LARS if config.name == "lars" else LARC, groups, momentum=config.momentum, eta=config.eta)
    if config.name == "lamb":
        return make(LAMB, groups, betas=betas)
    if config.name == "sgd":
        return make(torch.optim.SGD, groups, lr=0.0, momentum=config.momentum, nesterov=config.nesterov, fused=True)
    return make(torch.optim.AdamW, groups, lr=0.0, betas=betas, fused=True)


def _is_excluded(name: str, parameter: nn.Parameter, rules: tuple[str, ...]) -> bool:
    is_vector, is_token = parameter.ndim <= 1, name.rpartition(".")[2] in _TOKENS
    return (is_vector and "vectors" in rules) or (is_token and "tokens" in rules)


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state but keep the settings of this ``optimizer``: torch would put the saved ones in their place. Raises
    UserError where the saved groups are of other parameters."""
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    sizes, saved = ([len(g["params"]) for g in groups] for groups in (optimizer.param_groups, state["param_groups"]))
    if sizes != saved:
        raise UserError(
            f"optim.exclude: expected a checkpoint with {sizes[1]} of {sum(sizes)} parameters excluded, found "
            f"{saved[1]} of {sum(saved)}; set optim.exclude as it was, or choose a new run.dir"
        )
    optimizer.load_state_dict(state)
    if (share := acting(optimizer)) is not optimizer:  # whose own copy is not used; counts of updates are on the host
        share.load_state_dict(share.state_dict())
        optimizer.state.clear()
    for parameter, values in acting(optimizer).state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:  # fused kernels take for granted that both lie alike in memory
                values[name] = torch.empty_like(parameter).copy_(value)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group |= own


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman & Ginsburg, 2017) as in google-research/simclr.

    ``v <- m v + lr * trust * (g + wd w)``, ``w <- w - v``, with ``trust = eta |w| / |g + wd w|`` where ``adapt`` is set
    and both norms are positive, else 1. The learning rate is inside the momentum buffer, which matters while it moves.
    """

    _step_supports_amp_scaling = True
    sum_over_ranks: Callable[[torch.Tensor], object] | None = None  # in place, where tensors are shards of them

    def __init__(self, params: Any, *, lr: float = 0.0, momentum: float = 0.9, eta: float = 0.001) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "eta": eta, "weight_decay": 0.0, "adapt": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError(f"{type(self).__name__}.step takes no closure")
        for group in self.param_groups:
            params: list[torch.Tensor] = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params, [p.grad for p in params if p.grad is not None])

    def _update(self, group: dict[str, Any], params: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        """The gradients serve as memory for the update."""
        if group["weight_decay"]:
            torch._foreach_add_(gradients, params, alpha=group["weight_decay"])
        if group["adapt"]:
            w, g = self._norms(params), self._norms(gradients)
            trust = torch.where((w > 0) & (g > 0), group["eta"] * w / g, 1.0)
            torch._foreach_mul_(gradients, list(trust.unbind()))
        torch._foreach_mul_(gradients, group["lr"])
        self._descend(params, gradients, momentum=group["momentum"], lr=1.0)

    def _norms(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        norms = torch.stack(torch._foreach_norm(tensors))
        if self.sum_over_ranks is None:
            return norms
        self.sum_over_ranks(norms.square_())
        return norms.sqrt_()

    def _descend(
        self, params: list[torch.Tensor], gradients: list[torch.Tensor], *, momentum: float, lr: float
    ) -> None:
        """By torch's fused SGD, which applies the update, or leaves all as it is."""
        buffers: Any = self._buffers(params, "momentum_buffer")
        sgd(params, gradients, buffers, momentum=momentum, lr=lr, dampening=0.0, nesterov=False, **self._fused())

    def _fused(self) -> dict[str, Any]:
        return {"fused": True, "found_inf": getattr(self, "found_inf", None), "weight_decay": 0.0, "maximize": False}

    def _buffers(self, params: list[torch.Tensor], name: str, zeros: Zeros = torch.zeros_like) -> list[torch.Tensor]:
        """The state ``name`` of each parameter, at first ``zeros`` of it."""
        for parameter in params:
            if name not in self.state[parameter]:
                self.state[parameter][name] = zeros(parameter)
        return [self.state[parameter][name] for parameter in params]


class LARC(LARS):
    """LARS with a trust ratio that only lowers the learning rate, as apex's LARC and solo-learn's ``clip_lr``.

    ``v <- m v + min(trust / lr, 1) (g + wd w)``, ``w <- w - lr v``, ``trust = eta |w| / (|g| + wd |w| + 1e-8)``, where
    ``adapt`` is set and both norms are positive; else the minimum is replaced by 1.
    """

    def _update(self, group: dict[str, Any], params: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        w, g = self._norms(params), self._norms(gradients)
        torch._foreach_add_(gradients, params, alpha=group["weight_decay"])
        if group["adapt"]:
            trust = group["eta"] * w / (g + group["weight_decay"] * w + _LARC_EPS)
            ratio = torch.where((w > 0) & (g > 0), (trust / group["lr"]).clamp(max=1.0), 1.0)
            torch._foreach_mul_(gradients, list(ratio.unbind()))
        self._descend(params, gradients, momentum=group["momentum"], lr=group["lr"])


class LAMB(LARS):
    """Layer-wise adaptive moments (You et al., "Large batch optimization for deep learning: training BERT in 76
    minutes", 2020, algorithm 2, with the identity as phi).

    ``w <- w - lr * trust * u``, ``u`` being Adam's direction plus ``wd w``, and ``trust = |w| / |u|`` where ``adapt``
    is set and both norms are positive, else 1.
    """

    def __init__(self, params: Any, *, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        super().__init__(params, momentum=betas[0])
        self._beta2 = betas[1]
        for group in self.param_groups:
            group["fused"] = True  # `load_state_dict` then takes the counts of updates to the device

    def _update(self, group: dict[str, Any], params: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        """Torch's fused Adam moves zeros by the direction, or leaves them and the moments as they are."""
        moved, fused = [torch.zeros_like(p) for p in params], self._fused()
        first, second = (self._buffers(params, name) for name in ("exp_avg", "exp_avg_sq"))
        steps = self._buffers(params, "step", lambda p: torch.zeros((), device=p.device))
        betas = {"beta1": group["momentum"], "beta2": self._beta2}
        options = fused | betas | {"lr": 1.0, "eps": _LAMB_EPS, "amsgrad": False}
        adam(moved, gradients, first, second, [], steps, **options)
        update = list(torch._foreach_neg(moved))
        torch._foreach_add_(update, params, alpha=group["weight_decay"])
        w, u = self._norms(params), self._norms(update)
        trust = torch.where((w > 0) & (u > 0), w / u, 1.0) if group["adapt"] else torch.ones_like(w)
        accepted = 1.0 if fused["found_inf"] is None else 1 - fused["found_inf"]
        torch._foreach_mul_(update, list((-group["lr"] * accepted * trust).unbind()))
        torch._foreach_add_(params, update)
