from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.shuffle import Data, distance_of_neighbours, label_entropy, main, measure, windows
from sharding.manifest import ShardSet


def test_entropy_of_labels() -> None:
    assert label_entropy(np.array([0, 1, 2, 3, 0, 1, 2, 3], np.int32)) == pytest.approx(2)
    assert label_entropy(np.array([5, 5, 5], np.int32)) == 0


def test_distance_of_neighbours() -> None:
    first = np.array([[0, 1], [2, 3], [4, 5]])
    assert distance_of_neighbours(first, first, 6) == 0
    assert distance_of_neighbours(first, np.array([[0, 2], [4, 3], [5, 1]]), 6) == pytest.approx((2 + 1 + 1) / 3)
    assert distance_of_neighbours(first, np.array([[0, 2], [1, 3]]), 6) == 1


def test_sorted_classes_and_narrow_windows_show() -> None:
    """Shards of one class each: what the sharder's shuffle prevents."""
    data = Data(((64,) * 16,) * 2, np.repeat(np.arange(32), 64).astype(np.int32))
    options = Namespace(batch_size=32, seed=0)
    found = {name: measure(data, window, options) for name, window in windows([1, 4]).items()}
    assert found["full permutation"].class_entropy == pytest.approx(1, abs=0.03)
    assert found["full permutation"].neighbours_apart == pytest.approx(1, abs=0.15)
    assert found["window 1"].class_entropy < 0.4 < found["window 4"].class_entropy < 0.9
    assert found["window 1"].neighbours_apart < 0.2 < found["window 4"].neighbours_apart < 1


def test_prints_a_table_and_draws_a_picture(
    shard_set: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, out = tmp_path / "shuffle.png", tmp_path / "shuffle.json"
    paths = ["--picture", str(picture), "--out", str(out)]
    assert main(["--shards", str(shard_set.root), "--batch-size", "8", "--windows", "1", "2", *paths]) == 0
    assert "window 2" in capsys.readouterr().out
    assert picture.stat().st_size > 5000
    assert "full permutation" in out.read_text()
    assert main(["--shards", str(tmp_path / "nothing")]) == 2
    assert "no such directory" in capsys.readouterr().err
