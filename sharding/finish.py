"""From finished parts to a finished directory: equal lanes, the index, the quarantine list, the manifest.

Lanes that lost images are levelled by dealing out the samples of the last shards again. The new shards are
written aside and moved over the old ones only when all of them exist, so a crash at any point can go on.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import numpy as np
import pyarrow as pa

from sharding.engine import Engine
from sharding.manifest import (
    FORMAT_VERSION,
    INDEX_FILE,
    INDEX_SCHEMA,
    QUARANTINE_FILE,
    SAMPLE_SCHEMA,
    IndexFile,
    Manifest,
    Shard,
    fingerprint,
)
from sharding.part import BuildContext, PartRecord, index_name, shard_name
from sharding.plan import SPARE_LANE, Level, level
from sharding.storage import STATE, Directory, checksum
from sharding.writer import ShardWriter

TAIL_READY = f"{STATE}/tail.json"  # from here on the last shards are being replaced
_TAIL = f"{STATE}/tail"
_LIBRARIES = ("datasets", "pillow", "pyarrow", "simplejpeg")


@dataclass(frozen=True)
class TailShard:
    """A shard of samples that are encoded already: SAMPLE_SCHEMA and the archive that each comes from."""

    lane: int
    number: int
    samples: pa.Table


def finish(
    context: BuildContext,
    records: Sequence[PartRecord],
    samples_per_shard: int,
    engine: Engine,
    *,
    source: dict[str, Any],
    layout: dict[str, Any],
) -> Manifest:
    """Write everything that describes the shards, the manifest last. ``records`` in the order of the plan."""
    shards, surplus = level_lanes(context, records, samples_per_shard, engine)
    shards.sort(key=lambda record: (record.shard.lane, record.shard.path))
    write_quarantine(context.out, records)
    policy = asdict(context.policy)
    manifest = Manifest(
        version=FORMAT_VERSION,
        fingerprint=fingerprint([r.shard for r in shards], layout["lanes"], policy, context.source.class_names),
        source=source,
        policy=policy,
        layout=layout,
        num_read=sum(r.num_rows for r in records),
        num_samples=sum(r.shard.num_samples for r in shards),
        num_quarantined=sum(len(r.quarantined) for r in records),
        num_surplus=len(surplus),
        surplus_rows=tuple(surplus),
        changes=dict(sorted(sum((Counter(r.changes) for r in records), Counter[str]()).items())),
        class_names=context.source.class_names,
        shards=tuple(r.shard for r in shards),
        index=write_index(context.out, shards),
        libraries={name: metadata.version(name) for name in _LIBRARIES},
    )
    accounted = manifest.num_samples + manifest.num_quarantined + manifest.num_surplus
    assert manifest.num_read == accounted, f"{manifest.num_read} images were read, {accounted} are accounted for"
    assert manifest.num_samples % manifest.num_lanes == 0, "the lanes are not equal"
    manifest.save(context.out)
    return manifest


def level_lanes(
    context: BuildContext, records: Sequence[PartRecord], samples_per_shard: int, engine: Engine
) -> tuple[list[PartRecord], list[int]]:
    """Make lanes equal. Returns the records of the final shards and the source rows left over."""
    regular = [r for r in records if r.shard.lane != SPARE_LANE]
    spares = [r for r in records if r.shard.lane == SPARE_LANE]
    num_lanes = 1 + max(r.shard.lane for r in regular)
    counts = np.array([r.shard.num_samples for r in regular]).reshape(-1, num_lanes).T
    levelled = level(counts, sum(r.shard.num_samples for r in spares))
    split = levelled.num_kept_shards * num_lanes
    kept, pooled = regular[:split], regular[split:]
    pool = pa.concat_tables(
        [
            r.samples.append_column("archive", pa.array([r.shard.path] * len(r.samples), pa.string()))
            for r in [*sorted(pooled, key=lambda r: r.shard.lane), *spares]
        ]
        or [SAMPLE_SCHEMA.append(pa.field("archive", pa.string())).empty_table()]
    )
    tails, rest = deal(pool, counts, levelled, samples_per_shard)
    written = _write_tails(context, tails, engine)
    _replace_tails(context.out, pooled, written)
    for record in (r for r in kept if r.shard.num_samples == 0):
        _remove_shard(context.out, record.shard.path)
    return [r for r in kept if r.shard.num_samples] + written, rest


def deal(
    pool: pa.Table, counts: np.ndarray, levelled: Level, samples_per_shard: int
) -> tuple[list[TailShard], list[int]]:
    """Fill every lane from the pool, in order; returns the shards to write and the source rows left over."""
    tails: list[TailShard] = []
    position = 0
    for lane, kept in enumerate(counts[:, : levelled.num_kept_shards].sum(axis=1)):
        missing = levelled.num_samples_per_lane - int(kept)
        num_shards = -(-missing // samples_per_shard)
        for number, rows in enumerate(np.array_split(np.arange(missing), num_shards) if num_shards else []):
            samples = pool.slice(position, len(rows))
            tails.append(TailShard(lane, levelled.num_kept_shards + number, samples))
            position += len(rows)
    return tails, pool.slice(position).column("source_row").to_pylist()


def write_tail(context: BuildContext, tail: TailShard) -> PartRecord:
    """Copy samples out of finished archives into one new shard, and write its index and record, all aside."""
    name = shard_name(context.prefix, tail.lane, tail.number)
    rows: list[dict[str, int]] = []
    with (
        context.out.publish(f"{_TAIL}/{name}") as path,
        ShardWriter(path, bool(context.policy.decode_free)) as writer,
    ):
        for row in tail.samples.to_pylist():
            start, size = row["offset"], row["size"]
            image = context.out.read(row.pop("archive"), start, start + size)
            rows.append({**row, "offset": writer.add(row["source_row"], image, row["label"])})
    context.out.write(f"{_TAIL}/{index_name(name)}", writer.index)
    shard = Shard(name, tail.lane, len(rows), writer.num_bytes, writer.digest)
    record = PartRecord(shard, pa.Table.from_pylist(rows, SAMPLE_SCHEMA), [], {}, 0)
    context.out.write(f"{_TAIL}/{name}.arrow", record.to_bytes())
    return record


def write_quarantine(out: Directory, records: Sequence[PartRecord]) -> None:
    """One JSON object a line, by source row: source_row, key, label, reason."""
    rows = sorted((q for r in records for q in r.quarantined), key=lambda q: q["source_row"])
    out.write(QUARANTINE_FILE, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _write_tails(context: BuildContext, tails: list[TailShard], engine: Engine) -> list[PartRecord]:
    names = {f"{_TAIL}/{shard_name(context.prefix, t.lane, t.number)}.arrow": t for t in tails}
    if not context.out.exists(TAIL_READY):
        todo = [tail for name, tail in names.items() if not context.out.exists(name)]
        for _ in engine(write_tail, context, todo):
            pass
        context.out.write(TAIL_READY, b"{}\n")
    return [PartRecord.from_bytes(context.out.read(name)) for name in names]


def _replace_tails(out: Directory, pooled: list[PartRecord], written: list[PartRecord]) -> None:
    """Move the new shards over the old ones. Each step can be repeated."""
    for record in written:
        for name in (record.shard.path, index_name(record.shard.path)):
            if out.exists(f"{_TAIL}/{name}"):
                out.rename(f"{_TAIL}/{name}", name)
    for path in {r.shard.path for r in pooled} - {r.shard.path for r in written}:
        _remove_shard(out, path)


def _remove_shard(out: Directory, path: str) -> None:
    for name in (path, index_name(path)):
        if out.exists(name):
            out.remove(name)


def write_index(out: Directory, records: Sequence[PartRecord]) -> IndexFile:
    tables = [
        r.samples.add_column(0, INDEX_SCHEMA.field("shard"), pa.array(np.full(len(r.samples), i, np.int32)))
        for i, r in enumerate(records)
    ]
    table = pa.concat_tables(tables).cast(INDEX_SCHEMA).combine_chunks()
    with out.publish(INDEX_FILE) as path:
        with pa.ipc.new_file(path, INDEX_SCHEMA) as writer:
            writer.write_table(table)
        with path.open("rb") as file:
            return IndexFile(path.stat().st_size, checksum(file))
