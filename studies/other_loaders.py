"""Images per second of CPU time of our loader and of what lightly and stable-pretraining would use, two SimCLR views
each, in interleaved rounds of one pass over so many images. One worker or thread each.

    python -m studies.other_loaders --shards DIR --folder IMAGEFOLDER

Needs lightly. The parent's and the workers' CPU time is counted (the workers end with their round).
"""

import argparse
import os
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from pipeline.loader import Loader
from pipeline.order import Sequential
from pipeline.views import preset
from sharding.manifest import open_shards

_BATCH = 32


def cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def ours(shards: str, count: int) -> Iterable[Any]:
    order = Sequential(np.arange(count), _BATCH)
    return Loader(open_shards(shards), preset("simclr"), seed=0, order=order, num_threads=1)


def loaded(folder: str, transform: Callable[[Any], Any], count: int) -> Iterable[Any]:
    return DataLoader(Subset(ImageFolder(folder, transform), range(count)), _BATCH, shuffle=True, num_workers=1)


def lightly_views() -> Callable[[Any], Any]:
    from lightly.transforms import SimCLRTransform

    return SimCLRTransform(input_size=224)  # type: ignore[no-any-return]


def torchvision_views() -> Callable[[Any], Any]:
    """As stable-pretraining's `MultiViewTransform` of torchvision's v2 operations: SimCLR's, twice."""
    one = v2.Compose(
        [
            v2.RandomResizedCrop(224, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(23)], 0.5),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    return lambda image: [one(image), one(image)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=256, help="of a round")
    args = parser.parse_args()
    torch.set_num_threads(1)
    makers: dict[str, Callable[[], Iterable[Any]]] = {
        "Parallax, cpu": lambda: ours(args.shards, args.images),
        "lightly, SimCLRTransform": lambda: loaded(args.folder, lightly_views(), args.images),
        "torchvision v2": lambda: loaded(args.folder, torchvision_views(), args.images),
    }
    rates: dict[str, list[float]] = {name: [] for name in makers}
    next(iter(ours(args.shards, _BATCH)))  # compiles
    for name in args.rounds * list(makers):
        start = cpu_seconds()
        for _ in makers[name]():
            pass
        rates[name].append(args.images / (cpu_seconds() - start))
    for name, found in rates.items():
        print(
            f"{name:28s} {statistics.median(found):6.1f} ({min(found):.1f} to {max(found):.1f}) images per CPU second"
        )


if __name__ == "__main__":
    main()
