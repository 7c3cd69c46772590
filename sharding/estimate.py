"""What a build will need, from a few images of its source."""

import shutil
import time

from sharding.arguments import Layout
from sharding.encode import BadImageError, Policy, encode
from sharding.source import Source
from sharding.storage import Directory

SAMPLE_OVERHEAD_BYTES = 2048  # in an archive: two headers, a label, padding
_WORKER_BYTES = 104e6  # anonymous memory, measured
_ROW_BYTES = 93  # of the main process while it assembles the index, measured at 14 million rows


def encoded_size(source: Source, policy: Policy, num_probes: int = 64) -> tuple[float, float]:
    """Mean bytes in the shards (0: none of them is usable) and seconds of one core, of evenly spaced images."""
    sizes, start = [], time.perf_counter()
    rows = range(0, len(source), max(1, len(source) // num_probes))
    for row in rows:
        try:
            sizes.append(len(encode(source.read(row)[0], policy).data))
        except BadImageError:
            continue
    return sum(sizes) / max(1, len(sizes)), (time.perf_counter() - start) / max(1, len(rows))


def estimate(source: Source, policy: Policy, layout: Layout, out: Directory, num_workers: int) -> str:
    size, seconds = encoded_size(source, policy)
    num_bytes = len(source) * (size + SAMPLE_OVERHEAD_BYTES)
    shards = layout.lanes * max(1, round(num_bytes / layout.lanes / layout.shard_mb / 1e6))
    there = next(p for p in (out.local_path(), *out.local_path().parents) if p.exists()) if out.is_local else None
    free = f"{shutil.disk_usage(there).free / 1e9:,.1f} GB are free" if there else "not on this disk"
    return (
        f"{out}: {len(source):,} images of {len(source.class_names):,} classes, about {size / 1e3:,.0f} kB each\n"
        f"disk: {num_bytes / 1e9:,.1f} GB in about {shards:,} shards ({free})\n"
        f"time: {len(source) * seconds / num_workers / 60:,.1f} minutes with {num_workers} workers, if the source is "
        f"read as fast as now\n"
        f"memory: {(num_workers * _WORKER_BYTES + _WORKER_BYTES + len(source) * _ROW_BYTES) / 1e9:,.1f} GB"
    )
