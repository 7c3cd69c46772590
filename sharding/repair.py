"""Damaged files of a shard directory, made again exactly as they were.

A shard is a pure function of the source, the policy and its rows, so it can be written again alone. What does
not come out with the manifest's checksum is not published.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import xxhash

from sharding.encode import Policy
from sharding.finish import write_index
from sharding.jpeg import read_header
from sharding.manifest import INDEX_FILE, SAMPLE_SCHEMA, Index, Manifest, Shard, ShardError
from sharding.part import Job, Record, dali_index, index_name, write_rows
from sharding.source import SourceSpec, open_source
from sharding.storage import Directory


def repair(out: Directory, damaged: Sequence[str], dataset: str | None = None, cache: Path | None = None) -> None:
    """Restore the named files.

    Args:
        dataset: where the source is now, if not where the manifest says.

    Raises:
        ShardError: something cannot be restored.
        SourceError: the source cannot be opened.
    """
    manifest = Manifest.load(out)
    numbers = {shard.path: number for number, shard in enumerate(manifest.shards)}
    archives = [numbers[name] for name in damaged if name in numbers]
    if INDEX_FILE in damaged:
        if archives:
            raise ShardError(f"{out}: {INDEX_FILE} and shards are damaged; build the shards again elsewhere")
        _restore_index(out, manifest)
    if archives:
        _restore_archives(out, manifest, archives, dataset, cache)
    by_index_name = {index_name(path): number for path, number in numbers.items()}
    for name in damaged:
        if name in by_index_name:
            out.write(name, dali_index(Index.load(out), by_index_name[name]))
        elif name not in numbers and name != INDEX_FILE:
            raise ShardError(f"{out}/{name}: cannot be repaired; move it away, or build the shards again")


def _restore_archives(
    out: Directory, manifest: Manifest, numbers: Sequence[int], dataset: str | None, cache: Path | None
) -> None:
    asked = {field.name: manifest.source[field.name] for field in fields(SourceSpec)}
    source = open_source(SourceSpec(**{**asked, "dataset": dataset or asked["dataset"]}), cache)
    job = Job(source, Policy(**manifest.policy), out, prefix="")
    index = Index.load(out)
    for number in numbers:
        shard = manifest.shards[number]
        rows = index.source_row[index.rows_of(number)].tolist()
        if max(rows) >= len(source):
            raise ShardError(f"{out}/{shard.path}: {_CHANGED}")
        with out.publish(shard.path) as path:
            record, _ = write_rows(job, rows, path, shard)
            if record.shard != shard:
                raise ShardError(f"{out}/{shard.path}: {_CHANGED}")


_CHANGED = (
    "the source does not give the same bytes any more (other data, or another version of the libraries "
    "that the manifest names); build the shards again"
)


def _restore_index(out: Directory, manifest: Manifest) -> None:
    """From the archives: keys are source rows, and the JPEGs know their sizes."""
    records = [Record(shard, _scan(out, shard), [], {}, 0) for shard in manifest.shards]
    if write_index(out, records) != manifest.index:
        raise ShardError(f"{out}/{INDEX_FILE}: the archives do not give the index of the manifest; build again")


def _scan(out: Directory, shard: Shard) -> pa.Table:
    rows: list[dict[str, int]] = []
    with out.open(shard.path) as file, tarfile.open(fileobj=file) as archive:
        for member in archive:
            data = archive.extractfile(member)
            assert data is not None
            if member.name.endswith(".cls"):
                rows[-1]["label"] = int(data.read())
                continue
            jpeg = data.read()
            header, digest = read_header(jpeg), xxhash.xxh3_64_intdigest(jpeg)
            size = {"offset": member.offset_data, "size": member.size, "height": header.height, "width": header.width}
            rows.append({**size, "source_row": int(member.name.removesuffix(".jpg")), "xxh3_64": digest})
    return pa.Table.from_pylist(rows, SAMPLE_SCHEMA)
