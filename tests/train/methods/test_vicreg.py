import pytest
import torch
import torch.nn.functional as F

from train.methods import Loss, build_method
from train.methods.networks import Embeddings
from train.methods.vicreg import VICRegConfig
from train.model.encoder import EncoderConfig
from train.processes.distributed import World


def loss_of(z: torch.Tensor, **settings: float) -> Loss:
    config = VICRegConfig.model_validate({"hidden": 16, "out": 8, **settings})
    return build_method(config, EncoderConfig(name="resnet18", width=8), World()).loss(Embeddings(z, z))


def transcribed(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The loss of the authors' code as the paper's algorithm 1 goes: views (N, D), weights 25, 25, 1."""
    n, d = x.shape
    distance = F.mse_loss(x, y)
    hinges, covariances = [], []
    for z in (x, y):
        centred = z - z.mean(0)
        hinges.append(F.relu(1 - torch.sqrt(centred.square().sum(0) / (n - 1) + 1e-4)).mean())
        c = torch.einsum("ni,nj->ij", centred, centred) / (n - 1)
        covariances.append((c * (1 - torch.eye(d, dtype=z.dtype))).square().sum() / d)
    return 25 * distance + 25 * (hinges[0] / 2 + hinges[1] / 2) + covariances[0] + covariances[1]


def test_value_and_gradient_are_the_authors() -> None:
    z = (0.7 * torch.randn(2, 6, 8, dtype=torch.float64)).requires_grad_()
    loss = loss_of(z).value
    expected = transcribed(z[0], z[1])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(expected, z))


def test_more_views_average_over_pairs() -> None:
    z = torch.randn(3, 6, 8, dtype=torch.float64)
    pairs = [loss_of(z[[i, j]]).value for i, j in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(loss_of(z).value, torch.stack(pairs).mean())


def test_without_variance_collapse_is_a_minimum_and_with_it_is_not() -> None:
    collapsed = torch.ones(2, 6, 8)
    assert loss_of(collapsed, variance=0.0).value.item() == 0
    assert loss_of(collapsed).value.item() == pytest.approx(25 * 0.99)
    assert loss_of(torch.randn(2, 6, 8), variance=0.0).value.item() > 0
