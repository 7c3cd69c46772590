"""Shards of planes keep every promise of those of JPEGs."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from pipeline.backends import BackendContext, DamagedSampleError, build_backend
from pipeline.backends.cpu import Converter
from pipeline.backends.planes_gpu import PlanesBackend
from pipeline.loader import Batch, Loader
from pipeline.plan import plan_samples
from pipeline.preview import main as preview
from pipeline.reading.cache import CacheOptions
from pipeline.reading.reader import Reader
from pipeline.views import ViewSpec, in_levels
from sharding.encode import Policy
from sharding.manifest import ShardSet, open_shards
from tests.pipeline.gpu_kernels import DEVICE
from tests.sharding.conftest import build_shards, encoded, picture, write_parquet

SIZES = [(60, 90), (64, 64), (91, 61), (33, 47), (1, 1), (1, 30), (30, 1), (2, 5), (150, 110)]
SPECS = in_levels(
    [
        ViewSpec(count=2, size=48, kernel=5, blur=0, solarize=0.3),
        ViewSpec(size=24, scale=(0.05, 0.3), blur=0, interpolation="bicubic"),
        ViewSpec(size=32, resize=40, crop="center", flip=0, jitter=0, grey=0, blur=0),
    ]
)


@pytest.fixture(scope="module")
def decode_free(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """36 images of odd and even sizes, each fourth grey, in 2 lanes."""
    folder = tmp_path_factory.mktemp("decode-free")
    pictures = [picture(number, *SIZES[number % len(SIZES)]) for number in range(36)]
    images = [encoded(image if number % 4 else image.convert("L"), "PNG") for number, image in enumerate(pictures)]
    source = write_parquet(folder / "source", images, [number % 3 for number in range(36)])
    build_shards(source, folder / "out", lanes=2, policy=Policy(short_side=64, decode_free=True))
    return open_shards(folder / "out")


def batches(shards: ShardSet, count: int = 6, **options: Any) -> list[Batch]:
    with Loader(shards, SPECS, seed=3, global_batch_size=6, **options) as loader:
        return [next(loader) for _ in range(count)]


def equal(first: list[Batch], second: list[Batch]) -> bool:
    pairs = [(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one.views, two.views, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_views_are_to_the_bit_those_of_the_whole_image(decode_free: ShardSet, backend: str) -> None:
    assert equal(batches(decode_free, backend=backend), batches(decode_free, backend="torchvision"))


def test_shards_behind_a_url_give_the_same_batches(decode_free: ShardSet, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(decode_free.root), "/decode-free", recursive=True)
    remote = open_shards("memory://decode-free")
    cached = batches(remote, cache=CacheOptions(tmp_path, 10**7, 10**7))
    memory.rm("/decode-free", recursive=True)
    assert equal(cached, batches(decode_free))


@pytest.mark.parametrize("backend", ["cpu", "dali", "torchvision"])
def test_a_single_wrong_byte_is_reported_and_its_sample_replaced(
    decode_free: ShardSet, tmp_path: Path, caplog: pytest.LogCaptureFixture, backend: str
) -> None:
    expected, index = batches(decode_free), decode_free.index
    bad = int(expected[2].ids[1])
    root = Path(shutil.copytree(decode_free.root, tmp_path / "shards"))
    with (root / decode_free.manifest.shards[index.shard[bad]].path).open("r+b") as file:
        last = int(index.offset[bad] + index.size[bad]) - 1
        file.seek(last)
        byte = file.read(1)[0]
        file.seek(last)
        file.write(bytes([byte ^ 1]))
    with caplog.at_level(logging.WARNING):
        found = batches(open_shards(root), backend=backend)
    assert caplog.messages[0].startswith(f"replaced sample {bad} (lane-0")
    assert found[2].ids[1] != bad
    assert equal(found[:2], expected[:2])


def test_a_frame_of_a_different_size_is_an_error(decode_free: ShardSet) -> None:
    index = decode_free.index
    size = int(index.height[0]), int(index.width[0])
    data = Reader(decode_free).read(0)
    Converter()(data, *size, np.array([0, 0, *size]))
    with pytest.raises(ValueError, match=r"expected \d+ bytes of a frame of"):
        Converter()(data, size[0] + 1, size[1], np.array([0, 0, *size]))


def test_triton_makes_the_views_of_the_cpu(decode_free: ShardSet) -> None:
    """Planes are uploaded as they are; only blur, which these views have not, may differ."""
    reader, ids = Reader(decode_free), np.arange(15, 21)
    plan = plan_samples(decode_free, SPECS[1:], 3, 0, ids, np.zeros_like(ids))
    expected = build_backend("cpu", BackendContext(reader, 6, 2, torch.device("cpu"))).submit(plan).result()
    backend = PlanesBackend(BackendContext(reader, 6, 2, DEVICE))
    for view, other in zip(backend.submit(plan).result(), expected, strict=True):
        assert torch.equal(view.cpu(), other)
    assert backend.stats().decode_seconds > 0
    backend.close()


def test_before_triton_a_frame_of_a_different_size_is_refused(decode_free: ShardSet) -> None:
    """Its kernels would read beyond it."""
    plan = plan_samples(decode_free, SPECS, 3, 0, np.arange(6), np.zeros(6, np.int64))
    backend = PlanesBackend(BackendContext(Reader(decode_free), 6, 2, DEVICE))
    with pytest.raises(DamagedSampleError, match=r"^sample 4: expected \d+ bytes of a frame of"):
        backend.submit(replace(plan, heights=plan.heights + (plan.ids == 4))).result()
    backend.close()


def test_the_preview_shows_them(decode_free: ShardSet, tmp_path: Path) -> None:
    out = tmp_path / "views.png"
    assert preview(["--shards", str(decode_free.root), "--out", str(out), "--images", "2"]) == 0
    assert out.stat().st_size > 10_000
