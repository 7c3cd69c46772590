"""Encoders: torchvision's ResNets without their classifier, for ImageNet or for small images."""

from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from pipeline.settings import Settings

_RESNETS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
}


class EncoderConfig(Settings):
    name: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = Field("resnet50", description="architecture")
    stem: Literal["imagenet", "cifar"] = Field(
        "imagenet", description="7x7 stride 2 and max-pool, or 3x3 stride 1 without (images of 32 px)"
    )
    width: int = Field(64, ge=1, description="channels of the first stage; 64 is the standard network")
    zero_init_residual: bool = Field(True, description="residual branches start at zero (Goyal et al., 2017)")


class Encoder(nn.Module):
    """``forward``: images (n, 3, H, W) -> representations h (n, ``num_features``), averaged over positions."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        block, layers = _RESNETS[config.name]
        self.backbone = _ScaledResNet(block, layers, config)
        self.num_features = 8 * config.width * block.expansion

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        h: torch.Tensor = self.backbone(images)
        return h


class _ScaledResNet(ResNet):
    """torchvision's ResNet, its stages ``width / 64`` times as wide, with the chosen stem and no classifier."""

    def __init__(self, block: type[BasicBlock | Bottleneck], layers: list[int], config: EncoderConfig) -> None:
        self._width = config.width
        super().__init__(block, layers, num_classes=1, zero_init_residual=config.zero_init_residual)
        self.fc = nn.Identity()
        self.conv1 = nn.Conv2d(3, config.width, 7, stride=2, padding=3, bias=False)
        if config.stem == "cifar":
            self.conv1 = nn.Conv2d(3, config.width, 3, stride=1, padding=1, bias=False)
            self.maxpool = nn.Identity()
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(config.width)

    def _make_layer(
        self, block: type[BasicBlock | Bottleneck], planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        if planes == 64:
            self.inplanes = self._width
        return super()._make_layer(block, planes * self._width // 64, blocks, stride, dilate)
