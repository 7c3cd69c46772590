import re
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.loader import Loader
from pipeline.stats import bound, difference, thread_shares
from pipeline.views import ViewSpec
from sharding.manifest import open_shards
from tests.sharding.conftest import build_shards, encoded, write_parquet

QUIET = {
    "wait_seconds": 0.0,
    "plan_seconds": 0.01,
    "copy_seconds": 0.01,
    "read_seconds": 0.1,
    "decode_seconds": 1.0,
    "geometry_seconds": 0.5,
    "photometric_seconds": 1.5,
    "num_threads": 2,
}


@pytest.mark.parametrize(
    ("spent", "sentence"),
    [
        ({"wait_seconds": 0.1}, "bound by the train step: 1.0% of the time is spent waiting for data"),
        ({"wait_seconds": 0.3, "geometry_seconds": 12}, r"bound by the loader \(3% of the time\)"),
        ({"wait_seconds": 5, "geometry_seconds": 12}, r"bound by the loader \(50% .* \(60%\) resizing"),
        ({"wait_seconds": 5, "photometric_seconds": 12}, r"\(60%\) changing colours"),
        ({"wait_seconds": 9, "decode_seconds": 18}, r"\(89%\) decoding"),
        ({"wait_seconds": 9, "decode_seconds": 18, "read_seconds": 16}, r"\(80%\) reading"),
        (dict.fromkeys(QUIET, 0) | {"wait_seconds": 9, "num_threads": 2}, r"\(100%\) idle"),
        ({"wait_seconds": 6, "copy_seconds": 5}, r"\(60% of the time\), in its own thread"),
    ],
    ids=["network", "hardly", "geometry", "photometric", "decoding", "disk", "idle", "copy"],
)
def test_names_what_bounds_ten_seconds(spent: dict[str, float], sentence: str) -> None:
    assert re.search(sentence, bound({**QUIET, **spent}, 10.0))


def test_shares_count_reading_once_and_add_up() -> None:
    shares = thread_shares(QUIET, 10.0)
    assert shares == pytest.approx(
        {"reading": 0.005, "decoding": 0.045, "resizing": 0.025, "changing colours": 0.075, "idle": 0.85}
    )


def test_difference_keeps_means() -> None:
    before = {**QUIET, "queue_occupancy": 0.5}
    after = {**QUIET, "queue_occupancy": 0.75, "geometry_seconds": 3.5, "fetch_seconds": 1.0}
    found = difference(after, before)
    assert (found["geometry_seconds"], found["queue_occupancy"], found["fetch_seconds"]) == (3.0, 0.75, 1.0)
    assert (found["decode_seconds"], found["num_threads"]) == (0.0, 2)


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
        before, start = loader.stats(), time.perf_counter()
        for _ in range(3):
            next(loader)
        spent = difference(loader.stats(), before)
        diagnosis = bound(spent, time.perf_counter() - start)
    assert diagnosis.endswith("decoding")
    assert spent["read_seconds"] > 0
