"""The usual baseline: a folder of JPEG files per class, Pillow, torchvision's transforms, DataLoader workers.

https://docs.pytorch.org/vision/stable/generated/torchvision.datasets.ImageFolder.html
"""

from pathlib import Path

from torchvision.datasets import ImageFolder

from benchmarks.peers import PeerOptions
from benchmarks.peers.dataloader import IteratorPeer, name_of, over, temporary_directory
from benchmarks.peers.transforms import MakeViews
from pipeline.reading.reader import Reader
from sharding.manifest import ShardSet


def build(options: PeerOptions) -> IteratorPeer:
    directory = temporary_directory(options)
    unpack(options.shards, name_of(directory))
    dataset = ImageFolder(directory.name, transform=MakeViews(options.specs))
    return IteratorPeer(over(dataset, options), options.num_ahead, directory)


def unpack(shards: ShardSet, folder: Path) -> None:
    """``folder/label/sample.jpg``"""
    reader = Reader(shards)
    for sample, label in enumerate(shards.index.label.tolist()):
        path = folder / f"{label:05d}" / f"{sample:08d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(reader.read(sample).tobytes())
    reader.close()
