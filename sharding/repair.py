"""Damaged files of a shard directory, made again exactly as they were.

A shard is a pure function of the source, the policy and its rows, so it can be written again alone. What does
not come out with the manifest's checksum is not published.
"""

import tarfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from sharding.encode import Policy
from sharding.finish import write_index
from sharding.jpeg import read_header
from sharding.manifest import INDEX_FILE, MANIFEST_COPY, MANIFEST_FILE, Index, Manifest, Shard, ShardError
from sharding.part import BuildContext, PartRecord, dali_index, index_name, samples_table, write_rows
from sharding.planes import frame_size
from sharding.select import select
from sharding.source import SourceSpec, open_source
from sharding.storage import Directory


def repair(out: Directory, damaged: Sequence[str], dataset: str | None = None, cache: Path | None = None) -> None:
    """Restore the named files. ``dataset`` says where the source is now, if not where the manifest says.

    Raises ShardError for what cannot be restored, and SourceError when the source cannot be opened.
    """
    manifest = Manifest.load(out)
    numbers = {shard.path: number for number, shard in enumerate(manifest.shards)}
    dali_indices = {index_name(path): number for path, number in numbers.items()}
    if unknown := set(damaged) - {MANIFEST_FILE, MANIFEST_COPY, INDEX_FILE, *numbers, *dali_indices}:
        raise ShardError(f"{out}/{min(unknown)}: cannot be repaired; move it away, or build the shards again")
    archives = [numbers[name] for name in damaged if name in numbers]
    if INDEX_FILE in damaged:
        if archives:
            raise ShardError(f"{out}: {INDEX_FILE} and shards are damaged; build the shards again elsewhere")
        _restore_index(out, manifest)
    if {MANIFEST_FILE, MANIFEST_COPY} & set(damaged):
        manifest.save(out)
    index = Index.load(out)
    if archives:
        _restore_archives(out, manifest, index, archives, dataset, cache)
    for name in dali_indices.keys() & set(damaged):
        out.write(name, dali_index(manifest, index, dali_indices[name]))


def _restore_archives(
    out: Directory, manifest: Manifest, index: Index, numbers: Sequence[int], dataset: str | None, cache: Path | None
) -> None:
    asked: dict[str, Any] = {field.name: manifest.source.get(field.name) for field in fields(SourceSpec)}
    spec = SourceSpec(**{**asked, "dataset": dataset or asked["dataset"]})
    source = select(open_source(spec, cache), spec, manifest.layout["seed"])
    context = BuildContext(source, Policy(**manifest.policy), out, prefix="")
    for number in numbers:
        shard = manifest.shards[number]
        rows = index.source_row[index.rows_of(number)].tolist()
        with out.publish(shard.path) as path:
            if max(rows) >= len(source) or write_rows(context, rows, path, shard)[0].shard != shard:
                raise ShardError(
                    f"{out}/{shard.path}: the source does not give the same bytes any more (other data, or another "
                    "version of the libraries that the manifest names); build the shards again"
                )


def _restore_index(out: Directory, manifest: Manifest) -> None:
    records = [PartRecord(shard, _scan(out, shard, manifest.is_decode_free), [], {}, 0) for shard in manifest.shards]
    if write_index(out, records) != manifest.index:
        raise ShardError(f"{out}/{INDEX_FILE}: the archives do not give the index of the manifest; build again")


def _scan(out: Directory, shard: Shard, is_decode_free: bool) -> pa.Table:
    """The columns of SAMPLE_SCHEMA from an archive: keys are source rows, and the images know their sizes."""
    rows: list[tuple[int, ...]] = []
    with out.open(shard.path) as file, tarfile.open(fileobj=file) as archive:
        for member, cls in zip(members := iter(archive), members, strict=True):
            file.seek(member.offset_data)
            image = file.read(member.size)
            file.seek(cls.offset_data)
            label, digest = int(file.read(cls.size)), xxhash.xxh3_64_intdigest(image)
            height, width = frame_size(image) if is_decode_free else _jpeg_size(image)
            key = int(Path(member.name).stem)
            rows.append((member.offset_data, member.size, height, width, label, key, digest))
    return samples_table(rows)


def _jpeg_size(data: bytes) -> tuple[int, int]:
    header = read_header(data)
    return header.height, header.width
