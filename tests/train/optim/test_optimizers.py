import copy
from typing import Any

import pytest
import torch
from torch import nn

from sharding.command import UserError
from train.optim.optimizers import OptimConfig, build_optimizer, restore

RATES = [0.0, 0.3, 0.5, 0.1, 0.02]


def lars_by_hand(w: torch.Tensor, gradients: list[torch.Tensor], adapt: bool) -> torch.Tensor:
    """google-research/simclr, lars_optimizer.py: classic momentum, no Nesterov."""
    w, v = w.clone(), torch.zeros_like(w)
    for g, lr in zip(gradients, RATES, strict=True):
        g = g + (0.1 * w if adapt else 0)
        trust = 0.02 * w.norm() / g.norm() if adapt else 1.0
        v = 0.9 * v + lr * trust * g
        w = w - v
    return w


def larc_by_hand(w: torch.Tensor, gradients: list[torch.Tensor], adapt: bool) -> torch.Tensor:
    """solo-learn's LARS with clip_lr and without vectors: the learning rate is outside the momentum."""
    w, v = w.clone(), torch.zeros_like(w)
    for g, lr in zip(gradients, RATES, strict=True):
        if adapt:
            trust = 0.02 * w.norm() / (g.norm() + 0.1 * w.norm() + 1e-8)
            g = (g + 0.1 * w) * (min(float(trust) / lr, 1.0) if lr else 1.0)
        v = 0.9 * v + g
        w = w - lr * v
    return w


def lamb_by_hand(w: torch.Tensor, gradients: list[torch.Tensor], adapt: bool) -> torch.Tensor:
    """Algorithm 2 of You et al. (2020)."""
    w, m, v = w.clone(), torch.zeros_like(w), torch.zeros_like(w)
    for t, (g, lr) in enumerate(zip(gradients, RATES, strict=True), 1):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        r = m / (1 - 0.9**t) / ((v / (1 - 0.99**t)).sqrt() + 1e-6)
        u = r + (0.1 * w if adapt else 0)
        w = w - lr * (w.norm() / u.norm() if adapt else 1.0) * u
    return w


BY_HAND: dict[str, Any] = {"lars": lars_by_hand, "larc": larc_by_hand, "lamb": lamb_by_hand}


def optimizer_of(module: nn.Module, name: str, **settings: Any) -> torch.optim.Optimizer:
    return build_optimizer(OptimConfig(name=name, **settings), module)


def update(module: nn.Module, optimizer: torch.optim.Optimizer, lr: float, gradients: list[torch.Tensor]) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()


@pytest.mark.parametrize("size", [1e-3, 1.0])  # of the gradients: LARC clips at the smaller one
@pytest.mark.parametrize("name", BY_HAND)
def test_adaptive_optimizers_follow_a_transcription_under_a_moving_rate(name: str, size: float) -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 4).double()
    optimizer = optimizer_of(module, name, eta=0.02, weight_decay=0.1, beta2=0.99)
    before = [p.detach().clone() for p in module.parameters()]
    gradients = [[size * torch.randn_like(p) for p in before] for _ in RATES]
    for of_step, lr in zip(gradients, RATES, strict=True):
        update(module, optimizer, lr, of_step)
    for number, (found, start) in enumerate(zip(module.parameters(), before, strict=True)):
        expected = BY_HAND[name](start, [of_step[number] for of_step in gradients], start.ndim > 1)
        torch.testing.assert_close(found.detach(), expected, rtol=1e-7, atol=1e-14)


@pytest.mark.parametrize("name", BY_HAND)
def test_weights_or_gradients_of_zeros_are_not_divided_by(name: str) -> None:
    module = nn.Linear(3, 4)
    nn.init.zeros_(module.weight)
    optimizer = optimizer_of(module, name, weight_decay=0.0)
    for value in (0.0, 1.0, 0.0):
        update(module, optimizer, 0.1, [torch.full_like(p, value) for p in module.parameters()])
        assert all(p.isfinite().all() for p in module.parameters())
    assert module.weight.abs().min() > 0, "it moved by its gradient of ones"


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = (nn.Parameter(torch.ones(1, n, 4)) for n in (1, 9))
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))


@pytest.mark.parametrize(
    ("exclude", "excluded"),
    [
        ([], []),
        (["vectors"], ["layers.0.bias", "layers.1.bias", "layers.1.weight"]),
        (["tokens"], ["cls_token", "pos_embed"]),
        (["vectors", "tokens"], ["cls_token", "layers.0.bias", "layers.1.bias", "layers.1.weight", "pos_embed"]),
    ],
)
@pytest.mark.parametrize("name", ["lars", "larc", "lamb", "sgd", "adamw"])
def test_what_is_excluded_is_chosen_by_rule(name: str, exclude: list[str], excluded: list[str]) -> None:
    module = Tokens()
    optimizer = optimizer_of(module, name, exclude=exclude, weight_decay=0.5, excluded_rate=0.25)
    decayed, plain = optimizer.param_groups
    assert sorted(n for n, p in module.named_parameters() if any(p is q for q in plain["params"])) == excluded
    assert len(decayed["params"]) + len(plain["params"]) == 6
    assert [(g["weight_decay"], g["adapt"], g["lr_scale"]) for g in (decayed, plain)] == [
        (0.5, True, 1.0),
        (0.0, False, 0.25),
    ]
    update(module, optimizer, 0.1, [torch.ones_like(p) for p in module.parameters()])


@pytest.mark.parametrize("name", ["lars", "larc", "lamb", "sgd", "adamw"])
def test_a_restored_optimizer_continues_by_its_own_settings(name: str) -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(2, 3), torch.randn(2)]
    modules = [nn.Linear(3, 2) for _ in range(2)]
    optimizers = [optimizer_of(module, name, weight_decay=0.1) for module in modules]
    update(modules[0], optimizers[0], 0.1, gradients)
    modules[1].load_state_dict(modules[0].state_dict())
    saved = copy.deepcopy(optimizers[0].state_dict())
    for group in saved["param_groups"]:  # as checkpoints were before there was a scale
        del group["lr_scale"]
        group["weight_decay"] = 7.0
    restore(optimizers[1], saved)
    for module, optimizer in zip(modules, optimizers, strict=True):
        update(module, optimizer, 0.1, gradients)
    assert all(torch.equal(a, b) for a, b in zip(modules[0].parameters(), modules[1].parameters(), strict=True))


def test_a_checkpoint_with_other_exclusions_is_refused() -> None:
    module = Tokens()
    saved = optimizer_of(module, "sgd").state_dict()
    with pytest.raises(UserError, match=r"optim\.exclude: expected .* 5 of 6 parameters excluded, found 3 of 6"):
        restore(optimizer_of(module, "sgd", exclude=["vectors", "tokens"]), saved)


@pytest.mark.parametrize("name", ["lars", "larc", "lamb", "sgd", "adamw"])
def test_found_inf_leaves_parameters_and_state_alone(name: str) -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    optimizer = optimizer_of(module, name)
    stopped = torch.zeros(())
    optimizer.found_inf, optimizer.grad_scale = stopped, None  # type: ignore[attr-defined]

    def updated(value: float) -> torch.Tensor:
        update(module, optimizer, 0.1, [torch.full_like(p, value) for p in module.parameters()])
        return torch.cat([p.detach().flatten().clone() for p in module.parameters()])

    first, second = updated(1.0), updated(1.0)
    assert not torch.equal(first, second)
    stopped.fill_(1.0)
    assert torch.equal(updated(float("nan")), second)
    stopped.fill_(0.0)
    assert updated(1.0).isfinite().all()


def test_parameters_have_the_scales_of_their_names() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = build_optimizer(
        OptimConfig(name="sgd", excluded_rate=2.0), network, scales={"0.weight": 0.5, "0.bias": 0.5}
    )
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert [scales[id(p)] for p in network.parameters()] == [0.5, 1.0, 1.0, 2.0]


def test_nesterov_is_torchs_and_needs_momentum() -> None:
    optimizer = build_optimizer(OptimConfig(name="sgd", nesterov=True), nn.Linear(2, 2))
    assert optimizer.param_groups[0]["nesterov"]
    with pytest.raises(ValueError, match="nesterov: expected a momentum above 0, found 0"):
        OptimConfig(name="sgd", nesterov=True, momentum=0)
