"""Encoders: torchvision's ResNets without their classifier, for ImageNet or for small images, and all that timm has."""

import difflib
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from pipeline.settings import Settings
from sharding.command import UserError
from train.model.draws import Draws

TIMM = "timm:"


class _Shape(NamedTuple):
    block: type[BasicBlock | Bottleneck]
    layers: list[int]
    groups: int = 1
    width_per_group: int = 64


_RESNETS = {
    "resnet18": _Shape(BasicBlock, [2, 2, 2, 2]),
    "resnet34": _Shape(BasicBlock, [3, 4, 6, 3]),
    "resnet50": _Shape(Bottleneck, [3, 4, 6, 3]),
    "resnet101": _Shape(Bottleneck, [3, 4, 23, 3]),
    "resnet152": _Shape(Bottleneck, [3, 8, 36, 3]),
    "resnext50_32x4d": _Shape(Bottleneck, [3, 4, 6, 3], 32, 4),
    "resnext101_32x8d": _Shape(Bottleneck, [3, 4, 23, 3], 32, 8),
    "resnext101_64x4d": _Shape(Bottleneck, [3, 4, 23, 3], 64, 4),
    "wide_resnet50_2": _Shape(Bottleneck, [3, 4, 6, 3], 1, 128),
    "wide_resnet101_2": _Shape(Bottleneck, [3, 4, 23, 3], 1, 128),
}


class EncoderConfig(Settings):
    name: str = Field("resnet50", description=f"architecture: {', '.join(_RESNETS)}, or timm:NAME")
    stem: Literal["imagenet", "cifar"] = Field(
        "imagenet", description="7x7 stride 2 and max-pool, or 3x3 stride 1 without (images of 32 px)"
    )
    width: int = Field(64, ge=1, description="channels of the first stage; 64 is the standard network")
    zero_init_residual: bool = Field(True, description="residual branches start at zero (Goyal et al., 2017)")
    drop_path: float = Field(
        0.0, ge=0, lt=1, description="timm's: probability of leaving out the last block's branches, of others less"
    )
    image_size: int | None = Field(
        None, ge=1, description="ViTs: view size that has position embeddings of its own; others interpolate them"
    )

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        known = [TIMM + model for model in _timm().list_models()] if name.startswith(TIMM) else list(_RESNETS)
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1) or [f"one of {', '.join(_RESNETS)} or timm:NAME"]
            raise ValueError(f"unknown architecture; expected {near[0]}")
        return name

    @model_validator(mode="after")
    def _fields_fit(self) -> "EncoderConfig":
        if self.name.startswith(TIMM):
            for field in ("stem", "width", "zero_init_residual"):
                if getattr(self, field) != EncoderConfig.model_fields[field].default:
                    raise ValueError(f"{field}: only the ResNets without {TIMM} have it, {self.name} does not")
            return self
        if self.drop_path:
            raise ValueError(f"drop_path: only {TIMM} has it, {self.name} does not")
        if self.image_size is not None:
            raise ValueError(f"image_size: {self.name} takes views of any size; leave it out")
        if self.width * _RESNETS[self.name].width_per_group % 64:
            step = 64 // _RESNETS[self.name].width_per_group
            raise ValueError(f"width: expected a multiple of {step} for {self.name}, found {self.width}")
        return self


class Encoder(nn.Module):
    """``forward``: images (n, 3, H, W) -> representations h (n, ``num_features``): averaged over positions, or what the
    timm model pools them to (of most ViTs the class token). ViTs take any size that their patches divide, so views of
    many sizes. Of what timm may draw in it dropout is off, and paths are dropped by the draws of a step alone: see
    `DropPath`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        if config.name.startswith(TIMM):
            self.backbone = _timm_model(config)
            self.num_features: int = self.backbone.head_hidden_size
        else:
            shape = _RESNETS[config.name]
            self.backbone = _ScaledResNet(shape, config)
            self.num_features = 8 * config.width * shape.block.expansion
        self._paths = [module for module in self.modules() if isinstance(module, DropPath)]

    def draw_from(self, draws: Draws) -> None:
        """Paths are dropped by the draws of this step from now on; a network that was never told drops none."""
        if self._paths:
            step: Any = draws.ids.new_full((), draws.step)  # each int of a module's attributes would be compiled anew
            draws = replace(draws, step=step)
        for path in self._paths:
            path.draws, path.calls = draws, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        h: torch.Tensor = self.backbone(images)
        return h


class DropPath(nn.Module):
    """Leaves a residual branch out for some rows, with a probability, and makes up for it in the others (Huang et al.,
    "Deep networks with stochastic depth", 2016; timm's layer of that name). Rows (V b, ...) are V views of the b images
    of ``draws``, a view after the other; each is drawn for its image, so a part of a batch drops what the whole does.
    """

    def __init__(self, probability: float, name: str) -> None:
        super().__init__()
        self.probability, self.name = probability, name
        self.draws: Draws | None = None
        self.calls = 0  # within the step: views of other sizes come in others

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.draws is None or not self.training:
            return x
        self.calls += 1
        units = self.draws.uniform(f"{self.name} {self.calls}", len(x) // len(self.draws.ids))
        kept = (units >= self.probability).T.flatten().to(x) / (1 - self.probability)
        return x * kept.view(-1, *[1] * (x.ndim - 1))


def _timm() -> Any:
    """timm, which takes seconds to import."""
    import timm

    return timm


def _timm_model(config: EncoderConfig) -> Any:
    """Without classifier, randomly initialised, with positions for any view size where the model can have them."""
    name = config.name.removeprefix(TIMM)
    dropping = {"drop_path_rate": config.drop_path} if config.drop_path else {}
    for options in ({"dynamic_img_size": True}, {}):
        try:
            model = _timm().create_model(name, num_classes=0, img_size=config.image_size, **options, **dropping)
            return _without_dropping(model, config.drop_path > 0)
        except TypeError as error:  # from the constructor's signature, before anything is built
            if "unexpected keyword" not in str(error):
                raise
    fields = " and ".join(f for f in ("image_size", "drop_path") if getattr(config, f))
    raise UserError(f"encoder: {config.name} has no position embeddings, or no paths to drop; leave out {fields}")


def _without_dropping(model: nn.Module, paths: bool) -> nn.Module:
    """Some models drop by default, and all would draw it from torch's generator. With ``paths`` these are ours."""
    from timm.layers.drop import DropPath as Theirs

    for name, module in list(model.named_modules()):
        if isinstance(module, Theirs) and paths:
            model.set_submodule(name, DropPath(module.drop_prob, name))
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for rate in ("drop_prob", "drop_rate"):  # of layers and models that draw themselves
            if hasattr(module, rate):
                setattr(module, rate, 0.0)
    return model


def sines_and_cosines(height: int, width: int, dimensions: int) -> torch.Tensor:
    """Position embeddings (height * width, D): D / 4 sines and cosines of the column, then of the row, with frequencies
    from 1 down to 1 / 10000 (Vaswani et al., 2017, in two dimensions as MAE has them)."""
    omega = 10000.0 ** (-torch.arange(dimensions // 4, dtype=torch.float64) / (dimensions // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [place.flatten()[:, None] * omega for place in (columns, rows)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).float()


class _ScaledResNet(ResNet):
    """torchvision's ResNet, its stages ``width / 64`` times as wide, with the chosen stem and no classifier."""

    def __init__(self, shape: _Shape, config: EncoderConfig) -> None:
        self._width = config.width
        block, layers, groups, width_per_group = shape
        super().__init__(block, layers, 1, config.zero_init_residual, groups, width_per_group)
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
