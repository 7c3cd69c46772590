import math
from typing import Any

import pytest
import torch
from torch import nn

from train.config import load_config
from train.methods import Update, build_method, method_class
from train.methods.byol import BYOL, BYOLConfig
from train.methods.networks import Matches
from train.model.draws import Draws
from train.model.encoder import EncoderConfig
from train.processes.distributed import World


def byol(**settings: float) -> BYOL:
    torch.manual_seed(0)
    config = BYOLConfig(hidden=16, out=8, **settings)
    method = build_method(config, EncoderConfig(name="resnet18", width=8, stem="cifar"), World())
    assert isinstance(method, BYOL)
    return method.double()


def embeddings(num_views: int = 2) -> Matches:
    generator = torch.Generator().manual_seed(1)
    p, t = (torch.randn(num_views, 5, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    return Matches(p.requires_grad_(), t, p)


def transcribed(p: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Equation 2, loop by loop, for both ways round: |q/|q| - z/|z||^2."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(p.shape[1]):
        for own, other in ((0, 1), (1, 0)):
            q, target = p[own, i] / p[own, i].norm(), z[other, i] / z[other, i].norm()
            total = total + (q - target).square().sum()
    return total / p.shape[1]


def test_the_loss_and_its_gradient_are_the_papers() -> None:
    e = embeddings()
    loss = byol().loss(e).value
    expected = transcribed(e.predictions, e.targets)
    torch.testing.assert_close(loss, expected)
    (found,) = torch.autograd.grad(loss, e.predictions)
    (wanted,) = torch.autograd.grad(expected, e.predictions)
    torch.testing.assert_close(found, wanted)


def test_known_values() -> None:
    same = torch.ones(2, 3, 8, dtype=torch.float64)
    assert byol().loss(Matches(same, 5 * same, same)).value.item() == pytest.approx(0)
    assert byol().loss(Matches(same, -same, same)).value.item() == pytest.approx(8)


def test_a_view_is_never_its_own_target() -> None:
    e = embeddings(3)
    p = e.predictions.detach()
    only_own = Matches(p, p, p)
    everything = torch.einsum("ubd,vbd->uvb", *(torch.nn.functional.normalize(p, dim=-1),) * 2)
    mean = (everything.sum() - everything.diagonal().sum()) / (6 * 5)
    assert byol().loss(only_own).metrics["teacher_similarity"].item() == pytest.approx(float(mean))


def test_the_targets_are_the_teachers_without_gradient() -> None:
    method = byol()
    views = [torch.randn(4, 3, 16, 16, dtype=torch.float64) for _ in range(2)]
    e = method(views, Draws(0, 0, torch.arange(4)))
    assert e.predictions.shape == e.targets.shape == (2, 4, 8)
    assert e.predictions.requires_grad
    assert not e.targets.requires_grad
    method.loss(e).value.backward()
    trained = {name for name, p in method.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in method.named_parameters() if not name.startswith("teacher")}


@pytest.mark.parametrize("progress", [0.25, 1.0])
def test_tau_rises_along_a_cosine(progress: float) -> None:
    method = byol(tau=0.9)
    with torch.no_grad():
        method.encoder.backbone.conv1.weight.zero_()
    before = method.teacher_encoder.backbone.conv1.weight.clone()
    method.after_update(Update(progress, torch.tensor(1.0, dtype=torch.float64), None))
    tau = 1 - 0.1 * (math.cos(math.pi * progress) + 1) / 2
    torch.testing.assert_close(method.teacher_encoder.backbone.conv1.weight, tau * before)


def test_its_name_alone_is_its_recipe() -> None:
    config = load_config(None, ["method.name=byol"])
    assert [view.blur for view in config.views] == [1.0, 0.1]
    assert (config.optim.name, config.optim.learning_rate, config.optim.epochs) == ("lars", 0.2, 1000)
    assert (str(config.run.dir), config.run.global_batch_size) == ("runs/byol", 4096)
    assert load_config(None, ["method=byol", "optim.epochs=300", "views=simclr"]).optim.weight_decay == 1.5e-6


@pytest.mark.parametrize("name", ["byol", "mocov3", "ssl-hsic"])
def test_the_last_layers_of_heads_have_no_bias_in_the_authors_code(name: str) -> None:
    config = method_class(name).Config.model_validate({"hidden": 16, "out": 8})
    method: Any = build_method(config, EncoderConfig(name="resnet18", width=8), World())
    for head in (method.projector, method.predictor):
        assert [layer.bias for layer in head if isinstance(layer, nn.Linear)][-1] is None
