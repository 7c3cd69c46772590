from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.loader import Loader
from pipeline.stats import Stats, thread_shares
from pipeline.views import ViewSpec
from sharding.manifest import open_shards
from tests.sharding.conftest import build_shards, encoded, write_parquet

QUIET = Stats(
    seconds=10.0,
    thread_seconds=20.0,
    plan_seconds=0.01,
    copy_seconds=0.01,
    read_seconds=0.1,
    decode_seconds=1.0,
    geometry_seconds=0.5,
    photometric_seconds=1.5,
)


def test_shares_count_reading_once_and_add_up() -> None:
    assert thread_shares(QUIET) == pytest.approx(
        {"reading": 0.005, "decoding": 0.045, "resizing": 0.025, "changing colours": 0.075, "idle": 0.85}
    )


def test_sums_and_differences_are_taken_field_by_field() -> None:
    before = Stats(seconds=1.0, num_batches=3, num_ready=2, fetched_bytes=7)
    spent = Stats(seconds=2.0, num_batches=2, num_ready=4, decode_seconds=0.5)
    after = before + spent
    assert after == Stats(seconds=3.0, num_batches=5, num_ready=6, fetched_bytes=7, decode_seconds=0.5)
    assert after - before == spent


@pytest.mark.parametrize(("backend", "num_threads"), [("cpu", 2), ("dali", 2), ("dali", 16), ("torchvision", 1)])
def test_decoding_is_found_to_be_the_limit_where_it_is(tmp_path: Path, backend: str, num_threads: int) -> None:
    """Large noisy images and tiny views."""
    noise = np.random.default_rng(0).integers(0, 255, (900, 900, 3), np.uint8)
    images = [encoded(Image.fromarray(noise), quality=95) for _ in range(8)]
    build_shards(write_parquet(tmp_path / "source", images), tmp_path / "shards", lanes=1, shard_mb=100)
    spec = ViewSpec(size=8, scale=(1, 1), jitter=0, blur=0)
    shards = open_shards(tmp_path / "shards")
    with Loader(shards, [spec], seed=0, global_batch_size=8, backend=backend, num_threads=num_threads) as loader:
        next(loader)  # starts what has to be started
        before = loader.stats()
        for _ in range(3):
            next(loader)
        spent = loader.stats() - before
    shares = thread_shares(spent)
    assert max(shares, key=lambda name: shares[name]) == "decoding"
    assert spent.read_seconds > 0
