import pytest
import torch

from train.losses.redundancy import barlow_twins
from train.methods import Loss, build_method
from train.methods.barlow import BarlowTwinsConfig
from train.methods.networks import Embeddings
from train.model.draws import Draws
from train.model.encoder import EncoderConfig
from train.processes.distributed import World

NO_DRAWS = Draws(0, 0, torch.arange(6))


def loss_of(z: torch.Tensor, **settings: float) -> Loss:
    config = BarlowTwinsConfig.model_validate({"hidden": 16, "out": 8, **settings})
    return build_method(config, EncoderConfig(name="resnet18", width=8), World()).loss(Embeddings(z, z))


def test_projector_ends_without_batchnorm() -> None:
    barlow = build_method(BarlowTwinsConfig(hidden=16, out=8), EncoderConfig(name="resnet18", width=8), World())
    e = barlow([torch.randn(6, 3, 32, 32) for _ in range(2)], NO_DRAWS)
    assert e.z.shape == (2, 6, 8)
    assert [type(layer).__name__ for layer in barlow.projector][-2:] == ["ReLU", "Linear"]  # type: ignore[union-attr]


def test_loss_is_the_pure_one_times_its_scale() -> None:
    z = torch.randn(2, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(loss_of(z, scale=0.1, off_diagonal=0.2).value, 0.1 * barlow_twins(z[0], z[1], 0.2))


def test_more_views_average_over_pairs() -> None:
    z = torch.randn(3, 6, 8, dtype=torch.float64)
    pairs = [loss_of(z[[i, j]]).value for i, j in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(loss_of(z).value, torch.stack(pairs).mean())


def test_correlation_is_one_for_equal_views_and_zero_at_collapse() -> None:
    z = torch.randn(1, 6, 8, dtype=torch.float64).expand(2, 6, 8)
    assert loss_of(z).metrics["correlation"].item() == pytest.approx(1, abs=1e-6)
    assert loss_of(torch.ones(2, 6, 8)).metrics["correlation"].item() == 0
