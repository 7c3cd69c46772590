from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from sharding import spool as module
from sharding.source import SourceSpec, open_source
from tests.sharding.conftest import jpeg, write_parquet


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """300 images, spooled in segments of about one batch of 64."""
    monkeypatch.setattr(module, "SEGMENT_BYTES", 50_000)
    return write_parquet(tmp_path / "source", [jpeg(i) for i in range(300)], [i % 3 for i in range(300)])


def test_an_interrupted_stream_goes_on_where_it_was(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, cache = SourceSpec(str(source)), tmp_path / "cache"
    batches = datasets.IterableDataset.iter

    def breaks_off(self: datasets.IterableDataset, batch_size: int) -> Iterator[object]:
        for number, batch in enumerate(batches(self, batch_size)):
            if number == 3:
                raise ConnectionError("the network went away")
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(datasets.IterableDataset, "iter", breaks_off)
        with pytest.raises(ConnectionError):
            open_source(spec, cache, streaming=True)
    folder = module.spool_folder(spec, cache)
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("segment-*")}
    assert len(before) >= 4
    spooled = open_source(spec, cache, streaming=True)
    assert [spooled.read(row) for row in range(len(spooled))] == [(jpeg(i), i % 3) for i in range(300)]
    assert before.items() <= {p.name: p.stat().st_mtime_ns for p in folder.glob("segment-*")}.items()
    module.discard_spool(spec, cache)
    assert not folder.exists()
