import pytest
import torch
from torchvision.models import resnet18, resnet50

from train.encoder import Encoder, EncoderConfig


@pytest.mark.parametrize(("name", "reference"), [("resnet18", resnet18), ("resnet50", resnet50)])
def test_standard_width_is_torchvisions_network(name: str, reference: type) -> None:
    encoder = Encoder(EncoderConfig(name=name))
    expected = reference()
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
