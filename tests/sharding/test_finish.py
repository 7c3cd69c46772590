from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from sharding.manifest import open_shards
from tests.sharding.conftest import build_shards, files, jpeg, write_parquet

SOUND = [jpeg(i) for i in range(80)]


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_refused_lanes_are_equal_and_nothing_is_lost(tmp_path: Path, seed: int) -> None:
    """From no image to nearly all of them, in lanes of one to several shards."""
    draws = random.Random(seed)
    refused = set(draws.sample(range(80), draws.choice([0, 1, 2, 7, 30, 70])))
    images = [SOUND[row][:-20] if row in refused else SOUND[row] for row in range(80)]
    source = write_parquet(tmp_path / "source", images, [row % 3 for row in range(80)])
    lanes = draws.choice([1, 3, 4])
    manifest = build_shards(source, tmp_path / "out", lanes, draws.choice([0.005, 0.03, 1]), max_quarantine=1)
    index = open_shards(tmp_path / "out").index
    assert manifest.num_samples == (80 - len(refused)) // lanes * lanes
    assert manifest.num_surplus == (80 - len(refused)) % lanes == len(manifest.surplus_rows)
    by_lane = [sum(s.num_samples for s in manifest.shards if s.lane == lane) for lane in range(lanes)]
    assert by_lane == [manifest.num_samples_per_lane] * lanes
    assert sorted([*index.source_row.tolist(), *manifest.surplus_rows]) == sorted(set(range(80)) - refused)
    for row in range(len(index)):
        archive = (tmp_path / "out" / manifest.shards[index.shard[row]].path).read_bytes()
        start = index.offset[row]
        assert archive[start : start + index.size[row]] == SOUND[index.source_row[row]]
    names = {f"{shard.path[:-4]}{suffix}" for shard in manifest.shards for suffix in (".tar", ".idx")}
    assert set(files(tmp_path / "out")) == names | {
        "manifest.json",
        "manifest.copy.json",
        "index.arrow",
        "quarantine.jsonl",
    }
    for lane in range(lanes):
        numbers = [int(shard.path[-10:-4]) for shard in manifest.shards if shard.lane == lane]
        if len(refused) < 30:  # else whole shards may be empty, and are left out
            assert numbers == list(range(len(numbers)))


def test_few_refused_images_leave_all_but_the_last_shards_alone(tmp_path: Path) -> None:
    whole = build_shards(write_parquet(tmp_path / "a", SOUND, [0] * 80), tmp_path / "whole")
    images = [SOUND[0][:-20], *SOUND[1:]]
    holed = build_shards(write_parquet(tmp_path / "b", images, [0] * 80), tmp_path / "holed", max_quarantine=1)
    same = {s.path for s in whole.shards} & {s.path for s in holed.shards if s in whole.shards}
    assert len(same) >= len(whole.shards) - 5


def test_each_shard_is_a_uniform_sample(tmp_path: Path) -> None:
    """Classes arrive sorted; every lane gets its share of each, within four standard deviations."""
    labels = np.repeat([0, 1, 2], 200)
    source = write_parquet(tmp_path / "source", [SOUND[0]] * 600, labels.tolist())
    build_shards(source, tmp_path / "out", lanes=4, shard_mb=0.1)
    opened = open_shards(tmp_path / "out")
    lanes = np.array([shard.lane for shard in opened.manifest.shards])[opened.index.shard]
    counts = np.array([[(opened.index.label[lanes == lane] == label).sum() for label in range(3)] for lane in range(4)])
    assert np.abs(counts - 50).max() < 4 * np.sqrt(150 * (1 / 3) * (2 / 3))
