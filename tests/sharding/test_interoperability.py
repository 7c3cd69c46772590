"""Other programs read the shards, every sample once, with the same bytes."""

from __future__ import annotations

import gc
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sharding.manifest import ShardSet, open_shards
from tests.sharding.conftest import build_shards, encoded, jpeg, picture, write_parquet
from tests.sharding.test_jpeg import exif_segment, with_segment


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Every kind of image that decoders are known to treat differently."""
    folder = tmp_path_factory.mktemp("mixed")
    kinds = [
        jpeg(0),
        jpeg(1, progressive=True),
        encoded(picture(2).convert("L")),
        encoded(picture(3).convert("CMYK")),
        encoded(picture(4), "PNG"),
        encoded(picture(5).convert("RGBA"), "WEBP"),
        encoded(picture(6).quantize(64), "GIF"),
        with_segment(jpeg(7), exif_segment(6)),
        with_segment(jpeg(8), exif_segment(0)),
        with_segment(jpeg(9), exif_segment(1)),
        encoded(Image.fromarray(np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 20), "PNG"),
        jpeg(11, subsampling=2),
    ]
    source = write_parquet(folder / "source", kinds * 2, [i % 3 for i in range(24)])
    build_shards(source, folder / "out", lanes=2, shard_mb=0.02)
    return open_shards(folder / "out")


@pytest.fixture
def tars(mixed: ShardSet) -> list[str]:
    return [str(mixed.root / shard.path) for shard in mixed.manifest.shards]


def stored(shards: ShardSet) -> list[tuple[bytes, int]]:
    """(JPEG, label) of every sample, by id."""
    index = shards.index
    samples = []
    for row in range(len(index)):
        start = int(index.offset[row])
        path = shards.manifest.shards[index.shard[row]].path
        jpeg_bytes = shards.directory.read(path, start, start + int(index.size[row]))
        samples.append((jpeg_bytes, int(index.label[row])))
    return samples


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves archives open
def test_webdataset(mixed: ShardSet, tars: list[str]) -> None:
    import webdataset

    dataset = webdataset.WebDataset(tars, shardshuffle=False)
    samples = list(dataset)
    assert [(s["jpg"], int(s["cls"])) for s in samples] == stored(mixed)
    assert [int(s["__key__"]) for s in samples] == mixed.index.source_row.tolist()
    del dataset
    gc.collect()


def test_hugging_face(mixed: ShardSet, tars: list[str]) -> None:
    import datasets

    dataset = datasets.load_dataset("webdataset", data_files=tars, split="train")
    dataset = dataset.cast_column("jpg", datasets.Image(decode=False))
    assert [(row["jpg"]["bytes"], row["cls"]) for row in dataset] == stored(mixed)


@pytest.fixture
def dali_batches(tars: list[str]) -> Iterator[list[tuple[np.ndarray, int]]]:
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline

    indices = [tar.removesuffix(".tar") + ".idx" for tar in tars]
    pipeline = Pipeline(batch_size=4, num_threads=1, device_id=None)
    with pipeline:
        reader: Any = fn.readers.webdataset(paths=tars, index_paths=indices, ext=["jpg", "cls"])
        pipeline.set_outputs(fn.decoders.image(reader[0], device="cpu"), reader[1])
    pipeline.build()
    batches: Any = (pipeline.run() for _ in range(6))
    yield [
        (np.asarray(images.at(i)), int(bytes(labels.at(i)))) for images, labels in batches for i in range(len(labels))
    ]
    del pipeline


def test_dali_reads_every_sample_through_its_index(mixed: ShardSet, dali_batches: list[tuple[np.ndarray, int]]) -> None:
    assert [label for _, label in dali_batches] == [label for _, label in stored(mixed)]


@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")
def test_all_backends_decode_alike_at_the_size_of_the_index(
    mixed: ShardSet, dali_batches: list[tuple[np.ndarray, int]]
) -> None:
    """PIL, simplejpeg, torchvision and DALI: the orientation is in the pixels, not in a tag."""
    import simplejpeg
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    sizes = zip(mixed.index.height, mixed.index.width, strict=True)
    for (data, _), (by_dali, _), size in zip(stored(mixed), dali_batches, sizes, strict=True):
        by_pil = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        by_torchvision = decode_jpeg(tensor, ImageReadMode.RGB, apply_exif_orientation=True).permute(1, 2, 0).numpy()
        for other in (by_dali, by_torchvision, simplejpeg.decode_jpeg(data)):
            assert other.shape == (*size, 3) == by_pil.shape
            assert np.abs(other - by_pil).mean() < 0.6
