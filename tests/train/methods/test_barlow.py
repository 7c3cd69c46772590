import pytest
import torch
from torch import nn

from train.config import load_config
from train.losses.redundancy import barlow_twins
from train.methods import Loss, build_method
from train.methods.barlow import BarlowTwinsConfig
from train.methods.networks import Embeddings
from train.model.draws import Draws
from train.model.encoder import EncoderConfig
from train.optim.optimizers import OptimConfig, build_optimizer
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


def test_the_recipe_moves_as_the_authors_code_on_their_sixteen_gpus() -> None:
    """Its gradient is 1/16 of the loss's, its rates are 0.2 and for biases 0.0048, its decay is 1e-6."""
    recipe = load_config(None, ["method=barlow"]).optim
    theirs = OptimConfig(name="lars", weight_decay=1e-6, excluded_rate=0.0048 / 0.2)
    moved = []
    for config, share in ((recipe, 1.0), (theirs, 1 / 16)):
        generator = torch.Generator().manual_seed(0)
        network = nn.Linear(4, 3, dtype=torch.float64)
        optimizer = build_optimizer(config, network)
        for parameter in network.parameters():
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            parameter.grad = share * torch.randn(parameter.shape, dtype=torch.float64, generator=generator) * 1e-4
        for group in optimizer.param_groups:
            group["lr"] = 0.2 * group["lr_scale"]
        optimizer.step()
        moved.append(network)
    torch.testing.assert_close(moved[0].weight, moved[1].weight, rtol=1e-12, atol=0)
    torch.testing.assert_close(moved[0].bias, moved[1].bias, rtol=1e-12, atol=0)
