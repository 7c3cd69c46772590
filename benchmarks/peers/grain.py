"""An image folder by Grain, JAX's loader, in place of `torch.utils.data.DataLoader`: Pillow, torchvision's transforms.

https://google-grain.readthedocs.io
"""

from contextlib import ExitStack
from typing import Any

import grain
import torch
from torchvision.datasets import ImageFolder

from benchmarks.peers import Peer, PeerOptions
from benchmarks.peers.dataloader import batches_of
from benchmarks.peers.imagefolder import unpack
from benchmarks.peers.transforms import MakeViews


def build(options: PeerOptions, stack: ExitStack) -> Peer:
    dataset = (
        grain.MapDataset.source(ImageFolder(unpack(options, stack), transform=MakeViews(options.specs)))
        .shuffle(seed=0)
        .repeat()
        .map(_to_numpy)
        .batch(options.batch_size, drop_remainder=True)
        .to_iter_dataset(grain.ReadOptions(num_threads=0))  # the workers are the threads
        .mp_prefetch(grain.MultiprocessingOptions(options.num_threads, options.prefetch))
    )
    return batches_of(iter(dataset), stack)


def _to_numpy(sample: tuple[list[torch.Tensor], int]) -> tuple[list[Any], int]:
    """Arrays are what Grain hands over in shared memory."""
    views, label = sample
    return [view.numpy() for view in views], label
