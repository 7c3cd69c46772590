"""What very many samples cost: opening the index, its memory, the plan of a step. Nothing is read but the index.

python -m studies.large_index 14_000_000 --folder /tmp/index     # a synthetic index.arrow of 44 bytes a sample
python -m studies.large_index 1_000_000_000 --window 8           # no index: all images alike, only order and plan
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.order import Shuffled
from pipeline.plan import plan_samples
from pipeline.reading.look_ahead import LookAhead
from pipeline.views import preset
from sharding.manifest import INDEX_FILE, INDEX_SCHEMA, Index, IndexFile, Manifest, Shard, ShardSet, check_index
from sharding.storage import Directory

_LANES, _PER_SHARD, _SAMPLE_BYTES, _BATCH = 8, 2300, 112_000, 4096  # some 256 MB a shard, as ImageNet's


def shards_of(num_samples: int) -> tuple[Shard, ...]:
    per_lane = num_samples // _LANES
    counts = np.diff([*range(0, per_lane, _PER_SHARD), per_lane]).tolist()
    return tuple(Shard("", lane, n, (n + 1) * _SAMPLE_BYTES, "") for lane in range(_LANES) for n in counts)


def columns(shards: tuple[Shard, ...]) -> dict[str, np.ndarray]:
    """All images alike, one after the other. Only ``shard`` takes memory."""
    counts = np.array([shard.num_samples for shard in shards])
    constants = {"offset": 512, "size": _SAMPLE_BYTES - 2000, "height": 375, "width": 500}
    found = {"shard": np.repeat(np.arange(len(shards), dtype=np.int32), counts)}
    for field in INDEX_SCHEMA:
        value = np.array(constants.get(field.name, 0), field.type.to_pandas_dtype())
        found.setdefault(field.name, np.broadcast_to(value, counts.sum()))
    return found


def write_index(folder: Path, values: dict[str, np.ndarray]) -> None:
    arrays = [pa.array(np.ascontiguousarray(values[field.name]), field.type) for field in INDEX_SCHEMA]
    folder.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(folder / INDEX_FILE), "wb") as file, pa.ipc.new_file(file, INDEX_SCHEMA) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=INDEX_SCHEMA))


def report(what: str, start: float) -> None:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, peak = (int(lines[name].split()[0]) / 1e6 for name in ("VmRSS", "VmHWM"))
    print(f"{what:34s} {time.perf_counter() - start:8.3f} s   memory {now:5.2f} GB, at most {peak:5.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("num_samples", type=int)
    parser.add_argument("--folder", type=Path, help="where the index lies, or is written")
    parser.add_argument("--window", type=int, help="shards")
    args = parser.parse_args()
    shards, start = shards_of(args.num_samples), time.perf_counter()
    if args.folder and not (args.folder / INDEX_FILE).exists():
        write_index(args.folder, columns(shards))
        report("written; now the same command again", start)
        return
    report("libraries", start)
    index = Index.load(args.folder) if args.folder else Index(**columns(shards))
    report("index", start)
    layout = {"lanes": _LANES}
    counts = len(index), len(index), 0, 0
    manifest = Manifest(2, "", {}, {}, layout, *counts, (), {}, (), shards, IndexFile(0, ""), {})
    out = ShardSet(Directory.at(args.folder or "/"), manifest, index)
    start = time.perf_counter()
    if args.folder:
        check_index(out.directory, manifest, index)
        report("check of the index", start)
    sizes = tuple(tuple(shard.num_samples for shard in shards if shard.lane == lane) for lane in range(_LANES))
    order = Shuffled(sizes, 0, _BATCH, args.window)
    for step in (0, 1, 2, 3 * order.num_samples // _BATCH):  # the first compiles, the last is in the fourth pass
        start = time.perf_counter()
        ids, epochs = order.batch(step)
        between = time.perf_counter()
        plan_samples(out, preset("simclr"), 0, step, ids, epochs)
        report(f"plan of step {step}, after {between - start:.3f} s of ids", start)
    if args.window:
        start = time.perf_counter()
        ahead = LookAhead(out, order, slice(0, _BATCH))
        report("look ahead, made", start)
        start = time.perf_counter()
        ahead.advance(0)
        report("look ahead, 16 steps", start)
    print(f"{len(index):,} samples in {len(shards):,} shards, batches of {_BATCH}")


if __name__ == "__main__":
    main()
