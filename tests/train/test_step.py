import pytest
import torch

from train.encoder import EncoderConfig
from train.methods.simclr import SimCLR, SimCLRConfig
from train.optim import OptimConfig, build_optimizer
from train.step import NonFiniteGradientError, TrainStep


def small_run(optimizer: str) -> tuple[SimCLR, TrainStep]:
    torch.manual_seed(0)
    method = SimCLR(
        SimCLRConfig(hidden=32, out=16, layers=2), EncoderConfig(name="resnet18", width=8), gather=lambda z: z, rank=0
    )
    optim = build_optimizer(OptimConfig(name=optimizer), method)
    return method, TrainStep(method, method, optim, torch.float32)


def views(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 3, 32, 32, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
def test_repeated_steps_on_one_batch_lower_the_loss(optimizer: str) -> None:
    _, step = small_run(optimizer)
    rate = {"lars": 2.0, "sgd": 0.1, "adamw": 0.003}[optimizer]
    losses = [step(views(0), rate, 0.5)[0].item() for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1
    step.check()


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
def test_non_finite_gradient_stops_all_further_updates(optimizer: str) -> None:
    method, step = small_run(optimizer)
    step(views(0), 0.1, 0.1)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    poisoned = views(1)
    poisoned[0][0, 0, 0, 0] = float("nan")
    step(poisoned, 0.1, 0.2)
    step(views(2), 0.1, 0.3)
    for name, p in method.named_parameters():
        assert torch.equal(p, before[name]), name
    with pytest.raises(NonFiniteGradientError, match="no update"):
        step.check()


def test_bfloat16_stays_close_to_float32() -> None:
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        method, step = small_run("sgd")
        step = TrainStep(method, method, step._optimizer, dtype)
        losses.append(step(views(0), 0.01, 0.1)[0].item())
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
