import json
from pathlib import Path

import pytest

from benchmarks.reading import main
from sharding.manifest import ShardSet


def test_measures_every_way_cold_and_warm(
    shard_set: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "reading.json"
    assert main(["--shards", str(shard_set.root), "--rounds", "1", "--out", str(out)]) == 0
    results = json.loads(out.read_text())["results"]
    assert list(results) == ["page cache", "cold"]
    for rates in results.values():
        assert len(rates) == 8
        assert all(rounds[0] > 0 for rounds in rates.values())
    assert "read-ahead, at random" in capsys.readouterr().out
    assert main(["--shards", str(tmp_path / "none")]) == 2
