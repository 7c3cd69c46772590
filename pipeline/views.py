"""What a view is: the distribution that its crop and its photometric operations are drawn from."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from pipeline.settings import Settings, problem
from sharding.command import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)

Probability = Annotated[float, Field(ge=0, le=1)]
Interval = tuple[float, float]
PerChannel = tuple[float, float, float]
Divisor = Annotated[float, Field(gt=0)]


class ViewSpec(Settings):
    """One group of views. The operations follow torchvision's definitions and SimCLR's sequence: crop and antialiased
    resize, flip, colour jitter (its four operations in random order), grey, blur, solarize, normalise.
    """

    count: int = Field(1, ge=1, description="views of this kind per image")
    size: int = Field(224, ge=1, description="side of the square view, pixels")
    crop: Literal["random", "center"] = Field("random", description="random resized crop, or resize and centre crop")
    scale: Interval = Field((0.08, 1.0), description="random crop: area, as a fraction of the image's")
    ratio: Interval = Field((3 / 4, 4 / 3), description="random crop: width / height, log-uniform")
    resize: int = Field(256, ge=1, description="centre crop: short side of the resized image, pixels")
    interpolation: Literal["bilinear", "bicubic"] = Field("bilinear", description="of the antialiased resize")
    flip: Probability = Field(0.5, description="probability of a horizontal flip")
    jitter: Probability = Field(0.8, description="probability of colour jitter")
    brightness: float = Field(0.8, ge=0, description="factor in [max(0, 1 - x), 1 + x]")
    contrast: float = Field(0.8, ge=0, description="factor in [max(0, 1 - x), 1 + x]")
    saturation: float = Field(0.8, ge=0, description="factor in [max(0, 1 - x), 1 + x]")
    hue: float = Field(0.2, ge=0, le=0.5, description="shift in [-x, x] turns")
    grey: Probability = Field(0.2, description="probability of greyscale")
    blur: Probability = Field(0.5, description="probability of Gaussian blur")
    sigma: Interval = Field((0.1, 2.0), description="blur: standard deviation, pixels")
    kernel: int = Field(23, ge=1, description="blur: odd window, pixels")
    solarize: Probability = Field(0.0, description="probability of inverting values of 128 and above")
    mean: PerChannel = Field(IMAGENET_MEAN, description="subtracted, of values in [0, 1]")
    std: tuple[Divisor, Divisor, Divisor] = Field(IMAGENET_STD, description="divided by, of values in [0, 1]")

    @model_validator(mode="after")
    def _check(self) -> "ViewSpec":
        for name in ("scale", "ratio", "sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name}: expected 0 < low <= high, found {low}, {high}")
        if self.scale[1] > 1:
            raise ValueError(f"scale: expected a fraction of the image's area, at most 1, found {self.scale[1]}")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel: expected an odd number of pixels, found {self.kernel}")
        if self.blur and self.kernel // 2 >= self.size:
            raise ValueError(f"kernel: half of {self.kernel} must be smaller than the view's size {self.size}")
        if self.crop == "center" and self.resize < self.size:
            raise ValueError(f"resize: expected at least the size {self.size}, found {self.resize}")
        return self

    @property
    def is_cubic(self) -> bool:
        """Whether views are resized bicubically."""
        return self.interpolation == "bicubic"


_Groups = list[dict[str, Any]]  # as a configuration file would write them

_BICUBIC = {"interpolation": "bicubic"}
_NO_AUGMENTATION = {"flip": 0.0, "jitter": 0.0, "grey": 0.0, "blur": 0.0}
_HALF_JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
_LIKE_BYOL = {**_BICUBIC, **_HALF_JITTER, "saturation": 0.2}


def _on_cifar(groups: _Groups, **changes: Any) -> _Groups:
    """At 32 px, without blur."""
    size = {"size": 32, "blur": 0.0, "mean": CIFAR10_MEAN, "std": CIFAR10_STD}
    return [{**group, **size, **changes} for group in groups]


def _multicrop(count: int, size: int, small_count: int) -> _Groups:
    """SwAV's groups (Caron et al., 2020): full crops of [0.14, 1] of the area and 96 px crops of [0.05, 0.14]."""
    return [
        {"count": count, "size": size, "scale": (0.14, 1.0)},
        {"count": small_count, "size": 96, "scale": (0.05, 0.14)},
    ]


# Table 6 of Grill et al., 2020; Barlow Twins' too.
_BYOL: _Groups = [{**_LIKE_BYOL, "blur": 1.0}, {**_LIKE_BYOL, "blur": 0.1, "solarize": 0.2}]

# Bardes et al., 2022, appendix C.1: both views from one distribution.
_VICREG: _Groups = [{**_LIKE_BYOL, "count": 2, "solarize": 0.1}]

# Balestriero & LeCun, 2025: two global views and six local ones, alike but for their crops.
_LEJEPA: _Groups = [
    {**_LIKE_BYOL, "solarize": 0.2, "count": 2, "scale": (0.3, 1.0)},
    {**_LIKE_BYOL, "solarize": 0.2, "count": 6, "scale": (0.05, 0.3), "size": 98},
]

# HaiyuWu/visreg: LeJEPA's with four global views, local ones of 96 px and a window of 9 px for the blur. Solarized with
# 0.1: its 0.2 is the probability of torchvision's v2.RandomSolarize, which has one of 0.5 itself. (The hue of 0.05 in
# configs/default.yaml reaches its Kornia backend only, by which no weights were released.)
_VISREG: _Groups = [
    {**_LEJEPA[0], "solarize": 0.1, "kernel": 9, "count": 4},
    {**_LEJEPA[1], "solarize": 0.1, "kernel": 9, "size": 96},
]

# The defaults of the authors' main_dino.py (Caron et al., 2021): two global views of 224 px with BYOL's blur and
# solarization, eight local ones of 96 px. Their released models were trained with crops of their own, see the args
# beside each; their blur is Pillow's, an approximation that knows no window.
_DINO: _Groups = [
    *({**group, "scale": (0.4, 1.0)} for group in _BYOL),
    {**_LIKE_BYOL, "count": 8, "size": 96, "scale": (0.05, 0.4), "blur": 0.5},
]

PRESETS: dict[str, _Groups] = {
    "simclr": [{"count": 2}],
    "simclr-cifar": _on_cifar([{"count": 2, **_HALF_JITTER}]),
    "byol": _BYOL,
    "byol-cifar": _on_cifar(_BYOL),  # solo-learn's asymmetric augmentations
    "vicreg": _VICREG,
    "vicreg-cifar": _on_cifar(_VICREG, scale=(0.2, 1.0)),  # solo-learn's
    "lejepa": _LEJEPA,
    "visreg": _VISREG,
    "supervised": [{**_NO_AUGMENTATION, "flip": 0.5}],  # Goyal et al., 2017
    "mocov2": [{"count": 2, "scale": (0.2, 1.0), **_HALF_JITTER}],  # Chen et al., 2020; SimSiam's as well
    "mocov3": [{**group, "scale": (0.2, 1.0), "interpolation": "bilinear"} for group in _BYOL],
    "multicrop-2x160+4x96": _multicrop(2, 160, 4),
    "multicrop-2x224+6x96": _multicrop(2, 224, 6),
    "dino": _DINO,
    "mae": [{**_BICUBIC, "scale": (0.2, 1.0), **_NO_AUGMENTATION, "flip": 0.5}],  # He et al., 2022, section 4
    "eval": [{"crop": "center", **_NO_AUGMENTATION}],
}


def preset(name: str, **overrides: Any) -> tuple[ViewSpec, ...]:
    """The groups of a preset, ``overrides`` applied to each of them."""
    if name not in PRESETS:
        raise UserError(f"views: expected one of {', '.join(PRESETS)}, found {name!r}")
    return parse([{**group, **overrides} for group in PRESETS[name]])


def parse(groups: Sequence[Mapping[str, Any]]) -> tuple[ViewSpec, ...]:
    """Groups as a configuration file writes them. Raises ValueError: one line that names every wrong field."""
    try:
        return _GROUPS.validate_python(groups)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, ('views', *e['loc'])))}: {problem(e)}" for e in error.errors()]
        raise UserError("; ".join(lines)) from None


_GROUPS = TypeAdapter(tuple[ViewSpec, ...])


def flatten(specs: Sequence[ViewSpec]) -> tuple[ViewSpec, ...]:
    """One spec per view, in the order in which views are numbered and batches hold them."""
    return tuple(spec for spec in specs for _ in range(spec.count))


def in_levels(specs: Sequence[ViewSpec]) -> tuple[ViewSpec, ...]:
    """The same, but normalised views are levels from 0 to 255: to look at, and to compare exactly."""
    return tuple(spec.model_copy(update={"mean": (0.0,) * 3, "std": (1 / 255,) * 3}) for spec in specs)
