from __future__ import annotations

from pathlib import Path

import numpy as np

from sharding.encode import Policy
from sharding.manifest import Index, Manifest
from sharding.part import BuildContext, PartRecord, dali_index, index_name, record_name, write_part
from sharding.plan import Part
from sharding.source import SourceSpec, open_source
from sharding.storage import Directory
from tests.sharding.conftest import files


def test_a_part_is_a_pure_function(parquet: Path, tmp_path: Path) -> None:
    source = open_source(SourceSpec(str(parquet)))
    parts = [Part(lane, 2, np.array([5 + lane, 60, 0])) for lane in range(2)]
    for folder, order in (("one", parts), ("two", parts[::-1])):
        context = BuildContext(source, Policy(), Directory.at(tmp_path / folder), "train")
        for part in order:
            write_part(context, part)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert "lane-01/train-000002.tar" in files(tmp_path / "one")


def test_the_record_says_what_was_written(parquet: Path, tmp_path: Path, images: list[bytes]) -> None:
    context = BuildContext(
        open_source(SourceSpec(str(parquet))), Policy(max_pixels=10**6), Directory.at(tmp_path), "train"
    )
    part = Part(0, 0, np.array([7, 3]))
    name, record = write_part(context, part)
    assert name == record_name(part)
    assert PartRecord.from_bytes((tmp_path / name).read_bytes()) == record
    assert record.samples.column("source_row").to_pylist() == [7, 3]
    assert record.source_bytes == len(images[7]) + len(images[3])
    assert record.shard.num_bytes == (tmp_path / record.shard.path).stat().st_size


def test_dali_index_from_the_sample_index_is_the_written_one(shards: Path) -> None:
    index, manifest = Index.load(shards), Manifest.load(shards)
    for number, shard in enumerate(manifest.shards):
        assert dali_index(manifest, index, number) == (shards / index_name(shard.path)).read_bytes()
