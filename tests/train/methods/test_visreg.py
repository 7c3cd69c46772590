import pytest
import torch

from train.losses.distribution import centre, scale, shape, unit_slices
from train.methods import build_method
from train.methods.networks import Centred
from train.methods.visreg import VISReg, VISRegConfig
from train.model.draws import Draws
from train.model.encoder import EncoderConfig
from train.processes.distributed import World

DRAWS = Draws(0, 0, torch.arange(6))


def visreg(world: World, **settings: float) -> VISReg:
    config = VISRegConfig.model_validate({"hidden": 16, "out": 8, "slices": 32, **settings})
    method = build_method(config, EncoderConfig(name="resnet18", width=8), world)
    assert isinstance(method, VISReg)
    return method


def test_projector_has_gelu_and_ends_without_batchnorm() -> None:
    layers = [type(layer).__name__ for layer in visreg(World()).projector]
    assert layers == ["Linear", "BatchNorm1d", "GELU"] * 2 + ["Linear"]


def test_target_is_the_mean_of_the_global_views() -> None:
    e = visreg(World())([torch.randn(6, 3, size, size) for size in (32, 32, 16)], DRAWS)
    assert e.z.shape == (3, 6, 8)
    torch.testing.assert_close(e.centre, e.z[:2].mean(0, keepdim=True))


@pytest.mark.parametrize("regularizer", [0.0, 0.6, 1.0])
def test_loss_weighs_its_terms(regularizer: float) -> None:
    z = torch.randn(3, 6, 8, dtype=torch.float64)
    method = visreg(World(), regularizer=regularizer, scale=2.0, shape=3.0, centre=5.0)
    loss = method.loss(Centred(z, z[:2].mean(0, keepdim=True), z), None, DRAWS)
    prediction = (z - z[:2].mean(0)).square().mean()
    slices = unit_slices(DRAWS.shared_normal("slices", 8, 32).double())
    expected = 2 * scale(z) + 3 * shape(z, slices).mean() + 5 * centre(z)
    torch.testing.assert_close(loss.value, (1 - regularizer) * prediction + regularizer * expected)


def test_processes_share_the_slices_out() -> None:
    """Also where their number does not divide that of the slices."""
    z = torch.randn(3, 6, 8, dtype=torch.float64)
    shares = [visreg(World(rank, 3))._shape(z, DRAWS) for rank in range(3)]
    torch.testing.assert_close(torch.stack(shares).mean(), visreg(World())._shape(z, DRAWS))
    assert len({round(share.item(), 9) for share in shares}) == 3
