import pytest
import torch
import torch.nn.functional as F

from tests.train.methods.steps import embeddings
from train.methods import build_method
from train.methods.networks import Predictions
from train.methods.simsiam import SimSiam, SimSiamConfig, negative_cosine
from train.model.draws import Draws
from train.model.encoder import EncoderConfig
from train.processes.distributed import World

NO_DRAWS = Draws(0, 0, torch.arange(6))


def build() -> SimSiam:
    torch.manual_seed(0)
    config = SimSiamConfig(hidden=16, out=8, layers=2, predictor_hidden=4)
    method = build_method(config, EncoderConfig(name="resnet18", width=8, stem="cifar"), World())
    assert isinstance(method, SimSiam)
    return method.double()


def transcribed(p1: torch.Tensor, p2: torch.Tensor, z1: torch.Tensor, z2: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 of the paper, image by image."""

    def distance(p: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        z = z.detach()
        return -torch.stack([a @ b / (a.norm() * b.norm()) for a, b in zip(p, z, strict=True)]).mean()

    return distance(p1, z2) / 2 + distance(p2, z1) / 2


def test_loss_and_gradients_are_the_papers() -> None:
    simsiam = build()
    z, p = embeddings(2, 6, 8).requires_grad_(), embeddings(2, 6, 8, seed=1).requires_grad_()
    found = simsiam.loss(Predictions(z, p, z)).value
    expected = transcribed(p[0], p[1], z[0], z[1])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert torch.autograd.grad(found, z, retain_graph=True, allow_unused=True)[0] is None
    torch.testing.assert_close(*(torch.autograd.grad(value, p)[0] for value in (found, expected)))


def test_network_is_the_papers() -> None:
    """z is normalised by the batch, without a scale; the prediction is the predictor's of that very view."""
    simsiam = build()
    made = simsiam([embeddings(6, 3, 32, 32, seed=view) for view in range(3)], NO_DRAWS)
    z = made.z.flatten(0, 1)
    torch.testing.assert_close(z.mean(0), torch.zeros(8).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(z.std(0, unbiased=False), torch.ones(8).double(), rtol=1e-2, atol=0)
    torch.testing.assert_close(simsiam.predictor(z).view(3, 6, 8), made.p)


def test_known_values() -> None:
    same = embeddings(1, 6, 8).expand(3, 6, 8)
    assert negative_cosine(same, 5 * same).item() == pytest.approx(-1)
    assert negative_cosine(same, -same).item() == pytest.approx(1)


def test_more_views_are_all_ordered_pairs() -> None:
    p, z = embeddings(3, 6, 8), embeddings(3, 6, 8, seed=1)
    pairs = [-F.cosine_similarity(p[v], z[w], dim=-1).mean() for v in range(3) for w in range(3) if v != w]
    torch.testing.assert_close(negative_cosine(p, z), torch.stack(pairs).mean())


def test_collapse_is_the_lowest_loss() -> None:
    """So the loss does not tell: a constant output has -1, and the gradient of the predictions vanishes there."""
    p = torch.ones(2, 6, 8, dtype=torch.float64, requires_grad=True)
    loss = negative_cosine(p, torch.ones(2, 6, 8).double())
    assert loss.item() == pytest.approx(-1)
    assert torch.autograd.grad(loss, p)[0].abs().max() < 1e-12
