"""Shards of small real JPEGs, built once by `sharding.build`, for everything that reads shards."""

import io
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.hub import HUB

os.environ["HF_ENDPOINT"] = HUB.url  # for the libraries, which read it when they are imported, and all processes

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from sharding.arguments import Layout
from sharding.build import build
from sharding.encode import Policy
from sharding.engine import start_forkserver
from sharding.manifest import ShardSet, open_shards
from sharding.source import SourceSpec
from sharding.storage import Directory
from tests import forking
from tests.census import wait_until

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

NUM_LANES = 4
_NUM_IMAGES = 92
_CLASSES = ["disc", "stripes", "checks"]


@pytest.fixture(scope="session")
def s3() -> Iterator[None]:
    """An S3 server on loopback, which the environment names. One for all tests: s3fs keeps its first connection."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'parallax-ssl[s3]'")
    moto_server = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[server]'")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            environment.setenv(name, "testing")
        yield
    server.stop()


@pytest.fixture(scope="session")
def program() -> Iterator[str]:
    """What stands for `sys.executable` where processes that import everything are to start at once: `tests.forking`."""
    start_forkserver()
    with tempfile.TemporaryDirectory() as directory:
        address, path = f"{directory}/socket", Path(directory, "python")
        server = multiprocessing.get_context("forkserver").Process(target=forking.serve, args=(address,))
        server.start()
        wait_until(Path(address).exists)
        forking.write_program(path, address)
        yield str(path)
        server.terminate()
        server.join()


@pytest.fixture
def at_once(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is started by `sys.executable` has imported everything."""
    monkeypatch.setattr(sys, "executable", program)


@pytest.fixture(scope="session")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """92 JPEGs of many sizes in 4 lanes of several shards each; never modified."""
    folder = tmp_path_factory.mktemp("shard-set")
    source, out = folder / "source", folder / "shards"
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=_CLASSES)})
    images = [{"bytes": _jpeg(number), "path": None} for number in range(_NUM_IMAGES)]
    labels = [number % len(_CLASSES) for number in range(_NUM_IMAGES)]
    (source / "data").mkdir(parents=True)
    dataset = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    dataset.to_parquet(source / "data" / "train-00000-of-00001.parquet")
    cache, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder / "cache"
    datasets.disable_progress_bars()
    try:
        build(SourceSpec(str(source)), Directory.at(out), Layout(NUM_LANES, shard_mb=0.06, seed=1), Policy())
    finally:
        datasets.config.HF_DATASETS_CACHE = cache
    return open_shards(out)


@pytest.fixture
def copied_shards(shard_set: ShardSet, tmp_path: Path) -> Path:
    """A copy of the shards to damage."""
    return Path(shutil.copytree(shard_set.root, tmp_path / "shards"))


@pytest.fixture
def damage(copied_shards: Path) -> Callable[[int], ShardSet]:
    """``damage(sample)`` overwrites the middle of a sample's JPEG in the copied shards and opens them."""

    def overwrite(sample: int) -> ShardSet:
        shards = open_shards(copied_shards)
        index = shards.index
        path = copied_shards / shards.manifest.shards[int(index.shard[sample])].path
        with path.open("r+b") as file:
            file.seek(int(index.offset[sample]) + int(index.size[sample]) // 2)
            file.write(b"\xff\xd9" * 32)
        return shards

    return overwrite


def _jpeg(number: int) -> bytes:
    """Shapes, gradients and noise: 60 to 139 pixels a side, upright and wide, colour and (each eighth) grey."""
    rng = np.random.default_rng(number)
    height, width = rng.integers(60, 140, 2)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float64)
    figures = [
        np.hypot(rows - height / 2, columns - width / 2) < 30,
        np.sin((rows + columns) / rng.uniform(2, 6)) > 0,
        (rows // 12 + columns // 12) % 2 > 0,
    ]
    figure = np.where(figures[number % 3][..., None], rng.uniform(0, 255, 3), rng.uniform(0, 255, 3))
    pixels = 0.7 * figure + 0.3 * np.stack([rows * 2, columns * 2, rows + columns], axis=-1)
    pixels += rng.normal(0, 6, pixels.shape)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    file = io.BytesIO()
    (image.convert("L") if number % 8 == 7 else image).save(file, "JPEG", quality=int(rng.integers(70, 96)))
    return file.getvalue()
