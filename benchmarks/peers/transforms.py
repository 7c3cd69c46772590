"""Views by torchvision's transforms, drawn by torchvision."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from pipeline.views import ViewSpec


class MakeViews:
    """An image to its views; picklable, for worker processes."""

    def __init__(self, specs: Sequence[ViewSpec]) -> None:
        self._transforms = [v2.Compose([*augmentations(spec), *normalization(spec)]) for spec in specs]

    def __call__(self, image: Image.Image) -> list[torch.Tensor]:
        image = image.convert("RGB")
        return [transform(image) for transform in self._transforms]


def augmentations(spec: ViewSpec) -> list[Callable[..., Any]]:
    """What is random; on Pillow images, which torchvision changes faster than tensors on a CPU."""
    interpolation = InterpolationMode(spec.interpolation)
    if spec.crop == "center":
        return [v2.Resize(spec.resize, interpolation, antialias=True), v2.CenterCrop(spec.size)]
    jitter = v2.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue)
    return [
        v2.RandomResizedCrop(spec.size, spec.scale, spec.ratio, interpolation, antialias=True),
        v2.RandomHorizontalFlip(spec.flip),
        v2.RandomApply([jitter], spec.jitter),
        v2.RandomGrayscale(spec.grey),
        v2.RandomApply([v2.GaussianBlur(spec.kernel, spec.sigma)], spec.blur),
        v2.RandomSolarize(128, spec.solarize),
    ]


def normalization(spec: ViewSpec) -> list[Callable[..., Any]]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(spec.mean, spec.std)]
