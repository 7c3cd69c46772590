"""The usual baseline: a folder of JPEG files per class, Pillow, torchvision's transforms, DataLoader workers.

https://docs.pytorch.org/vision/stable/generated/torchvision.datasets.ImageFolder.html
"""

from contextlib import ExitStack, closing
from pathlib import Path

from torchvision.datasets import ImageFolder

from benchmarks.generated import temporary_directory
from benchmarks.peers import Peer, PeerOptions
from benchmarks.peers.dataloader import batches_of, over
from benchmarks.peers.transforms import MakeViews
from pipeline.reading.reader import Reader


def build(options: PeerOptions, stack: ExitStack) -> Peer:
    folder = unpack(options, stack)
    dataset = ImageFolder(folder, transform=MakeViews(options.specs))
    return batches_of(over(dataset, options), stack)


def unpack(options: PeerOptions, stack: ExitStack) -> Path:
    """A folder of ``label/sample.jpg``."""
    folder = temporary_directory(stack, options.shards)
    with closing(Reader(options.shards)) as reader:
        for sample, label in enumerate(options.shards.index.label.tolist()):
            path = folder / f"{label:05d}" / f"{sample:08d}.jpg"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(reader.read(sample).tobytes())
    return folder
