"""The unit of work: one planned part of the source into one finished shard, as a pure function.

A part's files depend on the source, the policy and the part alone, so any worker, in any order, now or after
a crash, makes the same bytes. Its *record*, written last, says that it is done.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import xxhash

from sharding.encode import BadImageError, Policy, encode
from sharding.manifest import SAMPLE_SCHEMA, Index, Manifest, Shard
from sharding.plan import SPARE_LANE, Part
from sharding.planes import extension
from sharding.source import Source
from sharding.storage import STATE, Directory
from sharding.writer import ShardWriter, index_entry, index_text


@dataclass(frozen=True)
class BuildContext:
    """What all parts of a build share."""

    source: Source
    policy: Policy
    out: Directory
    prefix: str  # of shard names: the split


@dataclass(frozen=True)
class PartRecord:
    """What became of one part. ``samples`` has the columns of `SAMPLE_SCHEMA`, in the order of the archive."""

    shard: Shard
    samples: pa.Table
    quarantined: list[dict[str, Any]]
    changes: dict[str, int]
    source_bytes: int

    @property
    def num_rows(self) -> int:
        """Of the source."""
        return self.shard.num_samples + len(self.quarantined)

    def to_bytes(self) -> bytes:
        about = asdict(replace(self, samples=None))
        sink = pa.BufferOutputStream()
        table = self.samples.replace_schema_metadata({"record": json.dumps(about)})
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        table = pa.ipc.open_stream(data).read_all()
        about = json.loads(table.schema.metadata[b"record"])
        return cls(**{**about, "shard": Shard(**about["shard"]), "samples": table.replace_schema_metadata(None)})


def shard_name(prefix: str, lane: int, number: int) -> str:
    return f"{STATE}/spare.tar" if lane == SPARE_LANE else f"lane-{lane:02d}/{prefix}-{number:06d}.tar"


def record_name(part: Part) -> str:
    return f"{STATE}/parts/{part.lane}-{part.number}.arrow"


def index_name(shard_path: str) -> str:
    """Name of a shard's DALI index."""
    return shard_path.removesuffix(".tar") + ".idx"


def dali_index(manifest: Manifest, index: Index, number: int) -> bytes:
    """DALI's index of a shard, from the sample index."""
    columns = (index.source_row, index.offset, index.size, index.label)
    name, rows = extension(manifest.is_decode_free), index.rows_of(number)
    return index_text([index_entry(name, *(int(column[row]) for column in columns)) for row in rows])


def write_part(context: BuildContext, part: Part) -> tuple[str, PartRecord]:
    """Read, check and write the rows of one part, then its DALI index and its record; returns that, and its name."""
    name = shard_name(context.prefix, part.lane, part.number)
    with context.out.publish(name) as path:
        record, index = write_rows(context, part.rows.tolist(), path, Shard(name, part.lane, 0, 0, ""))
    context.out.write(index_name(name), index)
    context.out.write(record_name(part), record.to_bytes())
    return record_name(part), record


def write_rows(context: BuildContext, rows: list[int], path: Path, shard: Shard) -> tuple[PartRecord, bytes]:
    """Write the usable ones of ``rows`` as one archive at ``path``; returns its record and its DALI index."""
    samples: list[tuple[int, ...]] = []
    quarantined: list[dict[str, Any]] = []
    changes: Counter[str] = Counter()
    source_bytes = 0
    with ShardWriter(path, bool(context.policy.decode_free)) as writer:
        for row in rows:
            data, label = context.source.read(row)
            source_bytes += len(data)
            try:
                image = encode(data, context.policy)
            except BadImageError as error:
                quarantined.append({"source_row": row, "key": f"{row:08d}", "label": label, "reason": str(error)})
                continue
            if image.change:
                changes[image.change] += 1
            offset = writer.add(row, image.data, label)
            digest = xxhash.xxh3_64_intdigest(image.data)
            samples.append((offset, len(image.data), image.height, image.width, label, row, digest))
    shard = replace(shard, num_samples=len(samples), num_bytes=writer.num_bytes, xxh3_128=writer.digest)
    return PartRecord(shard, samples_table(samples), quarantined, dict(changes), source_bytes), writer.index


def samples_table(rows: list[tuple[int, ...]]) -> pa.Table:
    """Rows, each with the fields of SAMPLE_SCHEMA, as columns."""
    columns = zip(*rows, strict=True) if rows else [()] * len(SAMPLE_SCHEMA)
    return pa.table(list(map(list, columns)), schema=SAMPLE_SCHEMA)
