"""The shards by the `webdataset` library: resampled shards, a shuffle buffer, Pillow, torchvision's transforms.

https://webdataset.github.io/webdataset/
"""

from contextlib import ExitStack

import torch
import webdataset as wds

from benchmarks.peers import Peer, PeerOptions
from benchmarks.peers.dataloader import batches_of, worker_options
from benchmarks.peers.transforms import MakeViews

_SHUFFLE_BUFFER = 1000  # samples, as in the library's examples


def build(options: PeerOptions, stack: ExitStack) -> Peer:
    urls = [str(options.shards.root / shard.path) for shard in options.shards.manifest.shards]
    dataset = (
        wds.WebDataset(urls, resampled=True, shardshuffle=False, nodesplitter=wds.split_by_node)
        .shuffle(_SHUFFLE_BUFFER)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(MakeViews(options.specs), int)
        .batched(options.batch_size, collation_fn=_collate)
    )
    loader = wds.WebLoader(dataset, batch_size=None, **worker_options(options))
    return batches_of(iter(loader), stack)


def _collate(samples: list[tuple[list[torch.Tensor], int]]) -> tuple[list[torch.Tensor], torch.Tensor]:
    views, labels = zip(*samples, strict=True)
    return [torch.stack(same) for same in zip(*views, strict=True)], torch.tensor(labels)
