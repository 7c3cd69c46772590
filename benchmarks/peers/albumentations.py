"""OpenCV decodes, albumentations augments, a DataLoader's workers run them: what most people would write for speed.

https://albumentations.ai/docs/integrations/pytorch/

OpenCV resizes without antialiasing, and hue is changed in its 8-bit HSV; greyscale, blur and solarize are torchvision's
but for rounding and borders.
"""

import os
from contextlib import ExitStack
from typing import Any

import torch
from torchvision.datasets import ImageFolder

from benchmarks.peers import Peer, PeerOptions
from benchmarks.peers.dataloader import batches_of, over
from benchmarks.peers.imagefolder import unpack
from pipeline.views import ViewSpec

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or importing it asks the network for a newer version
import albumentations as A
import cv2


def build(options: PeerOptions, stack: ExitStack) -> Peer:
    folder = unpack(options, stack)
    dataset = ImageFolder(folder, transform=MakeViews(options), loader=_read)
    return batches_of(over(dataset, options), stack)


class MakeViews:
    def __init__(self, options: PeerOptions) -> None:
        self._transforms = [A.Compose(_augmentations(spec)) for spec in options.specs]

    def __call__(self, image: Any) -> list[torch.Tensor]:
        cv2.setNumThreads(0)  # the workers are the threads
        return [transform(image=image)["image"] for transform in self._transforms]


def _read(path: str) -> Any:
    return cv2.imread(path, cv2.IMREAD_COLOR_RGB)


def _augmentations(spec: ViewSpec) -> list[Any]:
    end = [A.Normalize(spec.mean, spec.std), A.ToTensorV2()]
    interpolation = cv2.INTER_CUBIC if spec.is_cubic else cv2.INTER_LINEAR
    if spec.crop == "center":
        return [A.SmallestMaxSize(spec.resize, interpolation), A.CenterCrop(spec.size, spec.size), *end]
    return [
        A.RandomResizedCrop((spec.size, spec.size), spec.scale, spec.ratio, interpolation),
        A.HorizontalFlip(p=spec.flip),
        A.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue, p=spec.jitter),
        A.ToGray(p=spec.grey),
        A.GaussianBlur((spec.kernel, spec.kernel), spec.sigma, p=spec.blur),
        A.Solarize((0.5, 0.5), p=spec.solarize),
        *end,
    ]
