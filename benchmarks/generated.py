"""Shards made for a benchmark: of generated images where there are no data, and of given ones."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from sharding.command import UserError
from sharding.manifest import ShardSet


def generated_shards(stack: ExitStack, num_images: int, lanes: int = 8) -> Path:
    """Shards of textured JPEGs in a temporary directory: two thirds 500 x 375, about 110 kB, as most of ImageNet."""
    print(f"no shards given: using {num_images} generated images")
    return temporary_shards(temporary_directory(stack), [_textured(number) for number in range(num_images)], lanes)


def temporary_directory(stack: ExitStack, shards: ShardSet | None = None) -> Path:
    """Beside ``shards``, so that both are read from the same disk; elsewhere if that is not allowed."""
    where = shards.root.parent if shards and os.access(shards.root.parent, os.W_OK) else None
    return Path(stack.enter_context(TemporaryDirectory(prefix="parallax-", dir=where)))


def temporary_shards(directory: Path, encoded: Sequence[bytes], lanes: int, *options: str) -> Path:
    """Shards in ``directory`` of images with labels 0 to 9, as ``options`` of `sharding.build` say."""
    import datasets

    from sharding.build import main as build

    datasets.disable_progress_bars()
    source, out = directory / "source", directory / "shards"
    source.mkdir()
    images = [{"bytes": data, "path": None} for data in encoded]
    columns = {"image": images, "label": [number % 10 for number in range(len(images))]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(source / "train-00000-of-00001.parquet")
    arguments = ["--dataset", str(source), "--out", str(out), "--lanes", str(lanes), "--workers", "1", *options]
    if code := build(arguments):
        raise UserError(f"{len(images)} images could not be built into shards (exit code {code})")
    return out


def _textured(number: int) -> bytes:
    """Waves of many lengths, edges and noise, saturated here and there; a fifth upright, a third of halved chroma."""
    import simplejpeg

    rng = np.random.default_rng(number)
    height, width = rng.integers(120, 520, 2) if number % 3 == 2 else (375, 500)
    height, width = (width, height) if number % 5 == 0 else (height, width)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = np.zeros((height, width, 3))
    for length in (3, 8, 30, 90, 300):
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        wave = np.sin((rows * np.sin(angle) + columns * np.cos(angle)) * 2 * np.pi / length + phase)
        waves += (wave > 0.3 if length == 90 else wave)[..., None] * rng.uniform(-50, 50, 3)
    pixels = rng.uniform(40, 215, 3) + waves + rng.normal(0, 8, waves.shape)
    subsampling = "420" if number % 3 == 0 else "444"
    return simplejpeg.encode_jpeg(np.clip(pixels, 0, 255).astype(np.uint8), 90, colorsubsampling=subsampling)
