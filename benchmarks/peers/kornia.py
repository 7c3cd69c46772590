"""Workers decode and crop, kornia does the rest on whole batches, on the GPU where there is one.

https://kornia.readthedocs.io/en/latest/augmentation.html
"""

from collections.abc import Iterator

import torch
from kornia import augmentation as K
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.peers import PeerOptions
from benchmarks.peers.dataloader import IteratorPeer, name_of, over, temporary_directory
from benchmarks.peers.imagefolder import unpack
from benchmarks.peers.transforms import augmentations
from pipeline.views import ViewSpec


def build(options: PeerOptions) -> IteratorPeer:
    directory = temporary_directory(options)
    unpack(options.shards, name_of(directory))
    dataset = ImageFolder(directory.name, transform=MakeCrops(options))
    return IteratorPeer(_augmented(over(dataset, options), options), options.num_ahead, directory)


class MakeCrops:
    def __init__(self, options: PeerOptions) -> None:
        to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        self._transforms = [v2.Compose([augmentations(spec)[0], *to_tensor]) for spec in options.specs]

    def __call__(self, image: object) -> list[torch.Tensor]:
        return [transform(image) for transform in self._transforms]


def _augmented(
    batches: Iterator[tuple[list[torch.Tensor], torch.Tensor]], options: PeerOptions
) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    augment = [_augmentations(spec) for spec in options.specs]
    for views, labels in batches:
        yield [f(view.to(device)) for f, view in zip(augment, views, strict=True)], labels


def _augmentations(spec: ViewSpec) -> torch.nn.Module:
    return K.AugmentationSequential(
        K.RandomHorizontalFlip(p=spec.flip),
        K.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue, p=spec.jitter),
        K.RandomGrayscale(p=spec.grey),
        K.RandomGaussianBlur((spec.kernel, spec.kernel), spec.sigma, p=spec.blur),
        K.RandomSolarize(0.0, 0.0, p=spec.solarize),
        K.Normalize(torch.tensor(spec.mean), torch.tensor(spec.std)),
    )
