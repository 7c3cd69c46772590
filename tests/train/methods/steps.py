"""Some steps of a method beside those of a transcription of its paper, in float64."""

from collections.abc import Sequence

import torch
from torch import nn

from train.engine.step import TrainStep
from train.methods import Method
from train.model.draws import Draws
from train.optim.optimizers import OptimConfig, build_optimizer

STEPS, LEARNING_RATE = 4, 0.05


def embeddings(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def batch(step: int) -> list[torch.Tensor]:
    """Two views of six images."""
    return [embeddings(6, 3, 16, 16, seed=2 * step + view) for view in range(2)]


def descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> torch.Tensor:
    """A step of the transcription; returns its loss."""
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    optimizer.step()
    return loss.detach()


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(OptimConfig(name="sgd"), network)


def assert_steps(method: Method, parts: Sequence[nn.Module], losses: list[torch.Tensor], expected: nn.Module) -> None:
    """The method's steps have the ``losses`` of the transcription, and its ``parts`` then the weights ``expected``."""
    assert len(losses) == STEPS
    train = TrainStep(method, method, sgd(method), torch.float64)
    for step, loss in enumerate(losses):
        found = train(batch(step), Draws(0, step, torch.arange(6)), LEARNING_RATE, (step + 1) / len(losses)).value
        torch.testing.assert_close(found, loss, rtol=1e-9, atol=0)
    for name, value in nn.Sequential(*parts).state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-8, atol=1e-10)
