"""What very many samples cost to open, and their steps to plan: with files of the right size but no content.

python -m studies.large_index make 1_000_000_000 FOLDER       # sparse: 0.9 million files, 1 GB on the disk
python -m studies.large_index open FOLDER                     # --window 8
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.order import Shuffled, lane_shard_sizes
from pipeline.plan import plan_samples
from pipeline.reading.look_ahead import LookAhead
from pipeline.views import preset
from sharding.manifest import (
    FORMAT_VERSION,
    INDEX_FILE,
    INDEX_SCHEMA,
    Index,
    IndexFile,
    Manifest,
    Shard,
    fingerprint,
    open_shards,
)

_LANES, _PER_SHARD, _SAMPLE_BYTES, _BATCH = 8, 2300, 112_000, 4096  # some 256 MB a shard, as ImageNet's
_STEPS = 0, 1, 2, 100


class Sparse:
    """A file into which large blocks are not written: they stay zero."""

    def __init__(self, path: Path) -> None:
        self._file, self.closed = path.open("wb"), False

    def write(self, block: Any) -> int:
        num_bytes = memoryview(block).nbytes
        if num_bytes > 1 << 20:
            self._file.seek(num_bytes, os.SEEK_CUR)
        else:
            self._file.write(block)
        return num_bytes

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None: ...

    def close(self) -> None:
        self._file.close()
        self.closed = True


def make(num_samples: int, folder: Path) -> None:
    per_lane = num_samples // _LANES
    counts = np.diff([*range(0, per_lane, _PER_SHARD), per_lane]).tolist()
    names = [(lane, f"lane-{lane:02d}/train-{i:06d}.tar", n) for lane in range(_LANES) for i, n in enumerate(counts)]
    shards = tuple(Shard(name, lane, n, (n + 1) * _SAMPLE_BYTES, "0" * 32) for lane, name, n in names)
    for lane in range(_LANES):
        (folder / f"lane-{lane:02d}").mkdir(parents=True)
    for shard in shards:
        os.close(os.open(folder / shard.path, os.O_CREAT))
        os.truncate(folder / shard.path, shard.num_bytes)
        os.close(os.open((folder / shard.path).with_suffix(".idx"), os.O_CREAT))
    path, n = folder / INDEX_FILE, _LANES * per_lane
    arrays = [pa.array(np.zeros(n, field.type.to_pandas_dtype()), field.type) for field in INDEX_SCHEMA]
    with pa.PythonFile(Sparse(path), "w") as file, pa.ipc.new_file(file, INDEX_SCHEMA) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=INDEX_SCHEMA))
    fill(path, shards, n)
    mark = fingerprint(shards, _LANES, {}, [])
    index = IndexFile(path.stat().st_size, "0" * 32)
    counted = n, n, 0, 0
    Manifest(FORMAT_VERSION, mark, {}, {}, {"lanes": _LANES}, *counted, (), {}, (), shards, index, {}).save(folder)


def fill(path: Path, shards: tuple[Shard, ...], n: int) -> None:
    """Only rows that are looked at when the directory is opened, or belong to the steps that are planned."""
    data = pa.memory_map(str(path)).read_buffer()
    batch = pa.ipc.open_file(data).get_batch(0)
    sizes = tuple(tuple(shard.num_samples for shard in shards if shard.lane == lane) for lane in range(_LANES))
    ids = [Shuffled(sizes, 0, _BATCH, window).batch(step)[0] for window in (None, 8) for step in _STEPS]
    rows = np.unique(np.concatenate([np.arange(0, n, max(1, n // 1000)), *ids]))
    ends = np.cumsum([shard.num_samples for shard in shards])
    values: dict[str, Any] = {"offset": 512, "size": _SAMPLE_BYTES - 2000, "height": 375, "width": 500}
    values["shard"] = np.searchsorted(ends, rows, side="right")
    for name, value in values.items():
        column = batch.column(name)
        start = column.buffers()[1].address - data.address
        np.memmap(path, column.type.to_pandas_dtype(), "r+", start, n)[rows] = value


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def report(what: str, start: tuple[float, float]) -> None:
    seconds, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, peak = (int(lines[name].split()[0]) / 1e6 for name in ("RssAnon", "VmHWM"))
    print(
        f"{what:40s} {seconds:8.3f} s, CPU {cpu:7.3f}   memory of its own {own:5.2f} GB, with maps at most {peak:5.2f}",
        flush=True,
    )


def look(folder: Path, window: int | None) -> None:
    start = now()
    report("libraries", start)
    for _ in range(2):
        start = now()
        shards = open_shards(folder)
        report("open_shards", start)
    for what in (Manifest.load, Index.load):
        start = now()
        what(folder)
        report(f"of that {what.__qualname__}", start)
    start = now()
    order = Shuffled(lane_shard_sizes(shards), 0, _BATCH, window)
    report("order", start)
    if window:
        start = now()
        ahead = LookAhead(shards, order, slice(0, _BATCH // 8))
        ahead.advance(0)
        report("looking ahead, 16 steps", start)
    for step in (*_STEPS, *_STEPS):
        start = now()
        ids, epochs = order.batch(step)
        between = time.perf_counter() - start[0]
        plan_samples(shards, preset("simclr"), 0, step, ids, epochs)
        report(f"plan of step {step}, after {between:.3f} s of ids", start)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "open"))
    parser.add_argument("num_samples", type=int, nargs="?")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--window", type=int)
    args = parser.parse_args()
    if args.what == "make":
        make(args.num_samples, args.folder)
    else:
        look(args.folder, args.window)
