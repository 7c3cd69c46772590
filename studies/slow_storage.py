"""Images per second of the `cpu` backend from storage of which each read, or each request, takes a while longer.

    python -m studies.slow_storage SHARDS --mount EMPTY_FOLDER      # a local disk; needs what studies.slow_folder needs
    python -m studies.slow_storage SHARDS                           # S3: a moto server, through the cache

Rounds are interleaved; each starts cold.
"""

import argparse
import contextlib
import logging
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray

from pipeline.loader import Loader
from pipeline.reading.cache import CacheOptions
from pipeline.reading.reader import Reader
from pipeline.views import preset
from sharding.manifest import open_shards
from tests.pipeline.reading.faulty_s3 import Faults, s3_behind, serve

_BATCH, _STEPS = 64, 12
_read_ahead = Reader.read_ahead


def rate(url: str | Path, window: int | None, cache: CacheOptions | None = None) -> float:
    options: dict[str, Any] = {"window": window, "cache": cache, "num_threads": 2}
    with Loader(open_shards(url), preset("simclr"), seed=0, global_batch_size=_BATCH, **options) as batches:
        start = time.perf_counter()
        for _ in range(_STEPS):
            next(batches)
        return _BATCH * _STEPS / (time.perf_counter() - start)


@contextlib.contextmanager
def mounted(source: Path, folder: Path, milliseconds: float) -> Iterator[Path]:
    process = subprocess.Popen([sys.executable, "-m", "studies.slow_folder", source, folder, str(milliseconds)])
    while not (folder / "manifest.json").exists():
        time.sleep(0.05)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
        process.wait()


def folder_rate(args: argparse.Namespace, milliseconds: float, how: str) -> float:
    def none(_: Reader, __: NDArray[np.int64]) -> None: ...

    Reader.read_ahead = none if how == "no read-ahead" else _read_ahead  # type: ignore[method-assign]
    with mounted(args.shards, args.mount, milliseconds) as folder:
        return rate(folder, 2 if how == "window of 2 shards" else None)


def _serve(shards: Path, milliseconds: float, connection: Any) -> None:
    faults = Faults()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with serve(faults) as url, s3_behind(url):
        fsspec.filesystem("s3").mkdir("study")
        fsspec.filesystem("s3").put(str(shards), "study/shards", recursive=True)
        faults.latency_seconds = milliseconds / 1000
        connection.send(url)
        connection.recv()


def s3_rate(args: argparse.Namespace, milliseconds: float, how: str) -> float:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(args.shards, milliseconds, theirs))
    process.start()
    with s3_behind(ours.recv()), tempfile.TemporaryDirectory() as folder:
        cache = CacheOptions(Path(folder), 10**12, 10**12)
        found = rate("s3://study/shards", 2 if how == "window of 2 shards" else None, cache)
    ours.send(None)
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--mount", type=Path)
    parser.add_argument("--milliseconds", nargs="+", type=float, default=[0, 20, 100])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    hows = ["no read-ahead", "read-ahead", "window of 2 shards"] if args.mount else ["window of 2 shards", "no window"]
    rates: dict[tuple[float, str], list[float]] = {(ms, how): [] for ms in args.milliseconds for how in hows}
    rate(args.shards, None)  # compiles
    for milliseconds, how in args.rounds * list(rates):
        rates[milliseconds, how].append((folder_rate if args.mount else s3_rate)(args, milliseconds, how))
    for (milliseconds, how), found in rates.items():
        median = statistics.median(found)
        print(f"{milliseconds:5.0f} ms  {how:20s} {median:6.0f} ({min(found):.0f} to {max(found):.0f}) images/s")


if __name__ == "__main__":
    main()
