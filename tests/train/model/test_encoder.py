from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torchvision.models import get_model

from sharding.command import UserError
from train.methods import build_method
from train.methods.byol import BYOLConfig
from train.model.draws import Draws
from train.model.encoder import DropPath, Encoder, EncoderConfig, sines_and_cosines
from train.processes.distributed import World


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_standard_width_is_torchvisions_network(name: str) -> None:
    encoder = Encoder(EncoderConfig(name=name))
    expected = get_model(name)
    expected.fc = torch.nn.Identity()
    encoder.backbone.load_state_dict(expected.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(encoder.eval()(images), expected.eval()(images))


@pytest.mark.parametrize(("name", "width", "features"), [("resnet18", 16, 128), ("resnet50", 64, 2048)])
def test_num_features(name: str, width: int, features: int) -> None:
    encoder = Encoder(EncoderConfig(name=name, width=width))
    assert encoder.num_features == features
    assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, features)


def test_cifar_stem_keeps_the_resolution() -> None:
    encoder = Encoder(EncoderConfig(name="resnet18", stem="cifar", width=8))
    backbone = encoder.backbone
    stem = torch.nn.Sequential(backbone.conv1, backbone.bn1, backbone.relu, backbone.maxpool)
    assert stem(torch.randn(2, 3, 32, 32)).shape == (2, 8, 32, 32)


def test_same_seed_same_weights() -> None:
    def weights() -> torch.Tensor:
        torch.manual_seed(3)
        encoder = Encoder(EncoderConfig(name="resnet18", width=8))
        return torch.cat([p.flatten() for p in encoder.parameters()])

    assert torch.equal(weights(), weights())


@pytest.mark.parametrize("name", ["resnet34", "resnet101", "resnet152", "resnext101_32x8d", "resnext101_64x4d"])
def test_parameters_are_torchvisions(name: str) -> None:
    with torch.device("meta"):
        found, expected = Encoder(EncoderConfig(name=name)).backbone, get_model(name)
    expected.fc = torch.nn.Identity()
    assert {k: v.shape for k, v in found.state_dict().items()} == {k: v.shape for k, v in expected.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("timm:vit_tiny_patch16_224", 192),
        ("timm:resnet18", 512),
        ("timm:mobilenetv3_small_050", 1024),
    ],
)
def test_encoders_of_timm(name: str, features: int) -> None:
    """Of any size of view, so that views of several sizes pass it."""
    encoder = Encoder(EncoderConfig(name=name))
    assert encoder.num_features == features
    for side in (32, 96):
        assert encoder(torch.randn(2, 3, side, side)).shape == (2, features)


def test_image_size_has_position_embeddings_of_its_own() -> None:
    backbone: Any = Encoder(EncoderConfig(name="timm:vit_tiny_patch16_224", image_size=64)).backbone
    assert backbone.pos_embed.shape == (1, 1 + 4 * 4, 192)


@pytest.mark.parametrize(
    ("name", "size"),
    [("timm:swin_tiny_patch4_window7_224", 64), ("timm:swinv2_cr_tiny_224", 64), ("timm:ghostnet_050", None)],
)
def test_nothing_is_dropped(name: str, size: int | None) -> None:
    """Left alone, the first drops paths, the second activations, and the third representations."""
    encoder = Encoder(EncoderConfig(name=name, image_size=size)).train()
    before = torch.get_rng_state()
    encoder(torch.zeros(2, 3, 64, 64))
    assert torch.equal(torch.get_rng_state(), before)


def droppings(draws: Draws | None, rows: int, training: bool = True) -> torch.Tensor:
    path = DropPath(0.25, "blocks.0").train(training)
    path.draws = draws
    return path(torch.ones(rows, 3, 2))


def test_paths_are_dropped_by_the_draws_of_images_and_views() -> None:
    draws = Draws(0, 7, torch.arange(4000))
    factors = droppings(draws, 8000)
    assert factors.unique().tolist() == pytest.approx([0, 4 / 3])
    assert factors.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(factors, factors[:, :1, :1].expand_as(factors)), "a row is kept or left out"
    first, second = factors[:, 0, 0].chunk(2)
    assert (first == second).float().mean() == pytest.approx(0.25**2 + 0.75**2, abs=0.03), "views are drawn apart"
    part = droppings(draws.rows(slice(1000, 1200)), 400)[:, 0, 0].chunk(2)
    assert torch.equal(part[0], first[1000:1200])
    assert torch.equal(part[1], second[1000:1200])


def test_no_path_is_dropped_without_draws_or_in_evaluation() -> None:
    assert torch.equal(droppings(None, 6), torch.ones(6, 3, 2))
    assert torch.equal(droppings(Draws(0, 7, torch.arange(6)), 6, training=False), torch.ones(6, 3, 2))


def test_a_vit_drops_paths_of_the_student_and_not_of_the_teacher() -> None:
    encoder = EncoderConfig(name="timm:vit_tiny_patch16_224", image_size=32, drop_path=0.9)
    method: Any = build_method(BYOLConfig(hidden=8, out=8), encoder, World())
    views = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))] * 2
    before = torch.get_rng_state()
    found = [method(views, Draws(0, step, torch.arange(4))) for step in (1, 2, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found[0].h, found[2].h), "the same step draws the same"
    assert not torch.equal(found[0].h, found[1].h)
    assert not torch.equal(*found[0].h), "nor are equal views treated alike"
    torch.testing.assert_close(method.teacher_encoder(views[0]), method.encoder.eval()(views[0]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "resnet51"}, "expected resnet50"),
        ({"name": "vit"}, "expected one of resnet18, .*or timm:NAME"),
        ({"name": "timm:vit_tiny_patch16_225"}, "expected timm:vit_tiny_patch16_224"),
        ({"name": "timm:resnet18", "width": 32}, "width: only the ResNets"),
        ({"name": "timm:resnet18", "stem": "cifar"}, "stem: only the ResNets"),
        ({"name": "resnet18", "image_size": 32}, "image_size: resnet18 takes views of any size"),
        ({"name": "resnet18", "drop_path": 0.1}, "drop_path: only timm: has it, resnet18 does not"),
        ({"name": "resnext50_32x4d", "width": 8}, "width: expected a multiple of 16"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EncoderConfig(**fields)


def test_image_size_of_a_convolutional_network_of_timm_is_refused() -> None:
    with pytest.raises(UserError, match=r"encoder: timm:resnet18 has no position embeddings.*leave out image_size"):
        Encoder(EncoderConfig(name="timm:resnet18", image_size=64))


def test_sines_and_cosines_tell_places_by_their_distance() -> None:
    """The inner product of two places depends on how far apart they are alone, and is largest where they are one."""
    positions = sines_and_cosines(5, 7, 32).view(5, 7, 32)
    torch.testing.assert_close(positions[0, 0], torch.tensor([0.0] * 8 + [1.0] * 8).repeat(2))
    torch.testing.assert_close(positions[3, 2, 0], torch.tensor(2.0).sin())  # columns first, of frequency 1
    torch.testing.assert_close(positions[3, 2, 24], torch.tensor(3.0).cos())
    products = positions.flatten(0, 1) @ positions.flatten(0, 1).T
    torch.testing.assert_close(products.diagonal(), torch.full((35,), 16.0))
    torch.testing.assert_close(positions[1, 1] @ positions[2, 4], positions[3, 2] @ positions[4, 5])
    assert products.fill_diagonal_(0).max() < 16
