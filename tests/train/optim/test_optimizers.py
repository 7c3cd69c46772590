import pytest
import torch
from torch import nn

from train.optim.optimizers import LARS, OptimConfig, build_optimizer


def lars_by_hand(w: torch.Tensor, gradients: list[torch.Tensor], rates: list[float], adapt: bool) -> torch.Tensor:
    """google-research/simclr, lars_optimizer.py: classic momentum, no Nesterov."""
    w, v = w.clone(), torch.zeros_like(w)
    for g, lr in zip(gradients, rates, strict=True):
        g = g + (0.1 * w if adapt else 0)
        trust = 0.02 * w.norm() / g.norm() if adapt else 1.0
        v = 0.9 * v + lr * trust * g
        w = w - v
    return w


@pytest.mark.parametrize(("shape", "adapt"), [((4, 3), True), ((4,), False)])
def test_lars_follows_the_reference_under_a_moving_rate(shape: tuple[int, ...], adapt: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    gradients = [torch.randn(shape, generator=generator) for _ in range(4)]
    rates = [0.1, 0.5, 0.3, 0.0]
    parameter = nn.Parameter(start.clone())
    module = nn.Module()
    module.register_parameter("p", parameter)
    optimizer = build_optimizer(OptimConfig(name="lars", eta=0.02, weight_decay=0.1), module)
    assert isinstance(optimizer, LARS)
    for gradient, lr in zip(gradients, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        parameter.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), lars_by_hand(start, gradients, rates, adapt))


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_found_inf_leaves_parameters_and_state_alone(name: str) -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    optimizer = build_optimizer(OptimConfig(name=name), module)
    stopped = torch.zeros(())
    optimizer.found_inf, optimizer.grad_scale = stopped, None  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        group["lr"] = 0.1

    def update(value: float) -> torch.Tensor:
        for p in module.parameters():
            p.grad = torch.full_like(p, value)
        optimizer.step()
        return torch.cat([p.detach().flatten().clone() for p in module.parameters()])

    first, second = update(1.0), update(1.0)
    assert not torch.equal(first, second)
    stopped.fill_(1.0)
    assert torch.equal(update(float("nan")), second)
    stopped.fill_(0.0)
    assert update(1.0).isfinite().all()


def test_biases_and_batchnorm_are_not_decayed() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    decayed, plain = build_optimizer(OptimConfig(weight_decay=0.5), module).param_groups
    assert [p.ndim for p in decayed["params"]] == [4]
    assert [p.ndim for p in plain["params"]] == [1, 1, 1]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.5, 0.0)
