"""A Hugging Face data set on disk (Arrow, memory-mapped), `set_transform`, DataLoader workers.

https://huggingface.co/docs/datasets/use_with_pytorch
"""

from collections.abc import Iterator
from typing import Any

from datasets import Dataset, Features, Image, Value, disable_progress_bars, load_from_disk

from benchmarks.peers import PeerOptions
from benchmarks.peers.dataloader import IteratorPeer, over, temporary_directory
from benchmarks.peers.transforms import MakeViews
from pipeline.reading.reader import Reader
from sharding.manifest import ShardSet


def build(options: PeerOptions) -> IteratorPeer:
    disable_progress_bars()
    directory = temporary_directory(options)
    features = Features({"image": Image(), "label": Value("int64")})
    cache = f"{directory.name}/cache"
    rows = Dataset.from_generator(_rows, features, cache, gen_kwargs={"shards": options.shards})
    rows.save_to_disk(f"{directory.name}/data")
    dataset = load_from_disk(f"{directory.name}/data").with_transform(Transform(options))
    batches = ((batch["views"], batch["label"]) for batch in over(dataset, options))
    return IteratorPeer(batches, options.num_ahead, directory)


class Transform:
    def __init__(self, options: PeerOptions) -> None:
        self._make_views = MakeViews(options.specs)

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"views": [self._make_views(image) for image in rows["image"]], "label": rows["label"]}


def _rows(shards: ShardSet) -> Iterator[dict[str, Any]]:
    reader = Reader(shards)
    for sample, label in enumerate(shards.index.label.tolist()):
        yield {"image": {"bytes": reader.read(sample).tobytes(), "path": None}, "label": label}
    reader.close()
