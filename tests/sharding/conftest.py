from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from sharding.arguments import Layout
from sharding.build import build
from sharding.encode import Policy
from sharding.manifest import Manifest
from sharding.source import SourceSpec
from sharding.storage import Directory

CLASS_NAMES = ["circle", "square", "triangle"]


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("hf-cache")
    datasets.disable_progress_bars()


def picture(number: int, height: int = 48, width: int = 64) -> Image.Image:
    """A smooth coloured image that differs from number to number and from corner to corner."""
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [rows * 255 // height, columns * 255 // width, np.full_like(rows, number * 37 % 256)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def encoded(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:  # noqa: A002
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def jpeg(number: int, **options: Any) -> bytes:
    return encoded(picture(number), **options)


def write_parquet(folder: Path, images: Sequence[bytes], labels: Sequence[int] | None = None) -> Path:
    """A folder in the hub's layout, `data/train-*.parquet`."""
    features = datasets.Features({"image": datasets.Image()})
    columns: dict[str, list] = {"image": [{"bytes": data, "path": None} for data in images]}
    if labels is not None:
        features["label"] = datasets.ClassLabel(names=CLASS_NAMES)
        columns["label"] = list(labels)
    (folder / "data").mkdir(parents=True)
    dataset = datasets.Dataset.from_dict(columns, features=features)
    dataset.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="session")
def images() -> list[bytes]:
    return [jpeg(number) for number in range(61)]


@pytest.fixture(scope="session")
def parquet(tmp_path_factory: pytest.TempPathFactory, images: list[bytes]) -> Path:
    """61 sound JPEGs of three classes."""
    return write_parquet(tmp_path_factory.mktemp("parquet"), images, [i % 3 for i in range(len(images))])


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, parquet: Path) -> Path:
    """The parquet folder in 4 lanes of 15, several shards each; never modified."""
    out = tmp_path_factory.mktemp("shards") / "out"
    build_shards(parquet, out)
    return out


def build_shards(source: Path, out: Path, lanes: int = 4, shard_mb: float = 0.02, **options: Any) -> Manifest:
    """4 lanes of several shards each, unless told otherwise."""
    layout = Layout(lanes, shard_mb, seed=3)
    policy = options.pop("policy", Policy())
    return build(SourceSpec(str(source)), Directory.at(out), layout, policy, **options)


def files(root: Path) -> dict[str, bytes]:
    """Contents of all files below a directory."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="session")
def imagenet_sample() -> Path:
    """Real images in ILSVRC/imagenet-1k's schema, where the machine has some."""
    if "PARALLAX_IMAGENET_SAMPLE" not in os.environ:
        pytest.skip("PARALLAX_IMAGENET_SAMPLE does not name a folder of real images")
    return Path(os.environ["PARALLAX_IMAGENET_SAMPLE"])
