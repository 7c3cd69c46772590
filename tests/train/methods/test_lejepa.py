import pytest
import torch

from train.losses.distribution import characteristic, sigreg, unit_slices
from train.methods import Loss, build_method
from train.methods.lejepa import LeJEPA, LeJEPAConfig
from train.methods.networks import Centred
from train.model.draws import Draws
from train.model.encoder import EncoderConfig
from train.processes.distributed import World


def draws(step: int = 0) -> Draws:
    return Draws(0, step, torch.arange(6))


def lejepa(**settings: float) -> LeJEPA:
    torch.manual_seed(0)
    config = LeJEPAConfig.model_validate({"hidden": 16, "out": 8, "slices": 32, **settings})
    method = build_method(config, EncoderConfig(name="resnet18", width=8), World())
    assert isinstance(method, LeJEPA)
    return method


def made(sizes: list[int], **settings: float) -> tuple[Centred, Loss]:
    method = lejepa(**settings)
    generator = torch.Generator().manual_seed(0)
    e = method([torch.randn(6, 3, size, size, generator=generator) for size in sizes], draws())
    return e, method.loss(e, None, draws())


def test_the_centre_is_the_mean_of_the_first_views_of_one_size() -> None:
    e, _ = made([32, 32, 16, 16, 16])
    assert e.z.shape == (5, 6, 8)
    torch.testing.assert_close(e.centre, e.z[:2].mean(0, keepdim=True))
    e, _ = made([32, 32, 32, 32])
    torch.testing.assert_close(e.centre, e.z.mean(0, keepdim=True))


@pytest.mark.parametrize("regularizer", [0.0, 0.05, 1.0])
def test_loss_weighs_its_two_terms(regularizer: float) -> None:
    e, loss = made([32, 32, 16], regularizer=regularizer)
    slices = unit_slices(draws().shared_normal("slices", 8, 32))
    gaussian = sigreg(characteristic(e.z, slices), 6)
    invariance = sum(((view - e.z[:2].mean(0)) ** 2).mean() for view in e.z) / 3
    torch.testing.assert_close(loss.value, regularizer * gaussian + (1 - regularizer) * invariance)


def test_slices_are_new_each_step() -> None:
    method = lejepa(regularizer=1.0)
    views = [torch.randn(6, 3, 32, 32) for _ in range(2)]
    first, second, again = (method.loss(method(views, draws(step)), None, draws(step)).value for step in (0, 1, 0))
    assert first != second
    assert first == again


def test_sigreg_alone_makes_a_batch_gaussian() -> None:
    """Embeddings that are trained by it on their own leave a line for an isotropic cloud."""
    method = lejepa(regularizer=1.0)
    line = torch.randn(1, 64, 1) @ torch.ones(1, 8) / 3
    z = (line + 0.01 * torch.randn(1, 64, 8)).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.02)
    for step in range(400):
        optimizer.zero_grad()
        method.loss(Centred(z, z, z), None, draws(step)).value.backward()
        optimizer.step()
    values = torch.linalg.eigvalsh(torch.cov(z.detach()[0].T))
    assert values.min() > 0.5
    assert values.max() < 2
