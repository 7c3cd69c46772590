"""How fast encoded images come off the disk: from the page cache and cold, in sequence and at random.

    python -m benchmarks.reading --shards /data/shards

``pread`` is what the loader does (one call a sample into memory of its own), ``read-ahead`` the same after advising the
operating system a batch before, ``mmap`` a memory map whose pages are touched, ``mmap random`` the same advised against
read-ahead. Cold means that the files were dropped from the page cache of this machine; what lies below may cache, too.
"""

import argparse
import mmap
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import interleave
from benchmarks.report import save, show
from pipeline.reader import Reader
from sharding.command import command
from sharding.manifest import ShardSet, open_shards

Ids = NDArray[np.int64]
_BATCH = 64  # samples


@command("benchmarks.reading")
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    shards = open_shards(options.shards)
    results = {state: _measure(shards, state == "cold", options.rounds) for state in ("page cache", "cold")}
    if options.out:
        save(options.out, "python -m benchmarks.reading " + " ".join(arguments or sys.argv[1:]), results)
    return 0


def _measure(shards: ShardSet, cold: bool, rounds: int) -> dict[str, tuple[float, ...]]:
    count = len(shards.index)
    orders = {"in sequence": np.arange(count), "at random": np.random.default_rng(0).permutation(count)}
    contestants = {
        f"{name}, {order}": partial(_rate, shards, ids, work, cold)
        for (name, work), (order, ids) in product(_WAYS.items(), orders.items())
    }
    rates = interleave(contestants, rounds)
    mean = shards.index.size.mean() / 1000
    show(f"{'cold' if cold else 'page cache'}: samples of {mean:.0f} kB", "samples/s", rates, "pread, in sequence")
    return {name: rate.rounds for name, rate in rates.items()}


def _rate(shards: ShardSet, ids: Ids, work: Callable[[ShardSet, Ids], None], cold: bool) -> float:
    if cold:
        drop(shards)
    else:
        _pread(shards, ids)
    start = time.perf_counter()
    work(shards, ids)
    return len(ids) / (time.perf_counter() - start)


def drop(shards: ShardSet) -> None:
    """Out of this machine's page cache."""
    for shard in shards.manifest.shards:
        with (shards.root / shard.path).open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _pread(shards: ShardSet, ids: Ids) -> None:
    reader = Reader(shards)
    for sample in ids.tolist():
        reader.read(sample)
    reader.close()


def _read_ahead(shards: ShardSet, ids: Ids) -> None:
    reader = Reader(shards)
    reader.read_ahead(ids[:_BATCH])
    for start in range(0, len(ids), _BATCH):
        reader.read_ahead(ids[start + _BATCH : start + 2 * _BATCH])
        for sample in ids[start : start + _BATCH].tolist():
            reader.read(sample)
    reader.close()


def _mmap(shards: ShardSet, ids: Ids, advice: int = mmap.MADV_NORMAL) -> None:
    index, maps = shards.index, []
    for shard in shards.manifest.shards:
        with (shards.root / shard.path).open("rb") as file:
            maps.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
            maps[-1].madvise(advice)
    for sample in ids.tolist():
        start, size = int(index.offset[sample]), int(index.size[sample])
        np.frombuffer(maps[index.shard[sample]], np.uint8, size, start).max()


_WAYS: dict[str, Callable[[ShardSet, Ids], None]] = {
    "pread": _pread,
    "read-ahead": _read_ahead,
    "mmap": _mmap,
    "mmap random": partial(_mmap, advice=mmap.MADV_RANDOM),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reading", description="Measure reading samples.")
    parser.add_argument("--shards", required=True, help="directory made by sharding.build")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    parser.add_argument("--out", type=Path, help="JSON file for the results, machine and versions")
    return parser


if __name__ == "__main__":
    sys.exit(main())
