from __future__ import annotations

import numpy as np
import pytest

from sharding.plan import SPARE_LANE, level, plan_parts, shuffled_rows


def test_rows_are_a_permutation_that_only_the_seed_decides() -> None:
    rows = shuffled_rows(10_000, seed=5)
    assert np.array_equal(np.sort(rows), np.arange(10_000))
    assert np.array_equal(rows, shuffled_rows(10_000, seed=5))
    assert not np.array_equal(rows, shuffled_rows(10_000, seed=6))


def test_the_permutation_is_pinned() -> None:
    """Another order would make other shards of the same data: a new format version."""
    assert shuffled_rows(10, seed=0).tolist() == [2, 4, 6, 8, 5, 1, 7, 0, 9, 3]


def test_order_is_uniform() -> None:
    """Mean position of the first half of the source is that of the second: within 4 standard errors."""
    positions = np.argsort(shuffled_rows(100_000, seed=1))
    error = 100_000 / np.sqrt(12) * np.sqrt(2 / 50_000)
    assert abs(positions[:50_000].mean() - positions[50_000:].mean()) < 4 * error
    steps = np.corrcoef(positions[:-1], positions[1:])[0, 1]
    assert abs(steps) < 4 / np.sqrt(100_000)


@pytest.mark.parametrize(("num_rows", "num_lanes", "per_shard"), [(61, 4, 5), (64, 4, 5), (9, 8, 100), (100, 1, 7)])
def test_parts_hold_every_row_once_in_equal_lanes(num_rows: int, num_lanes: int, per_shard: int) -> None:
    parts = plan_parts(num_rows, num_lanes, per_shard, seed=0)
    assert sorted(np.concatenate([p.rows for p in parts]).tolist()) == list(range(num_rows))
    sizes = {lane: [len(p.rows) for p in parts if p.lane == lane] for lane in range(num_lanes)}
    assert {sum(s) for s in sizes.values()} == {num_rows // num_lanes}
    assert max(max(s) for s in sizes.values()) <= per_shard
    assert max(max(s) - min(s) for s in sizes.values()) <= 1
    spares = [p for p in parts if p.lane == SPARE_LANE]
    assert sum(len(p.rows) for p in spares) == num_rows % num_lanes


def test_equal_lanes_are_left_alone() -> None:
    result = level(np.array([[5, 5], [5, 5]]), num_spares=1)
    assert (result.num_samples_per_lane, result.num_kept_shards, result.num_surplus) == (10, 2, 1)


def test_a_hole_reopens_the_last_shards_only() -> None:
    result = level(np.array([[5, 5, 5], [4, 5, 5]]), num_spares=1)
    assert (result.num_samples_per_lane, result.num_kept_shards, result.num_surplus) == (15, 2, 0)


def test_many_holes_reopen_as_many_shards_as_needed() -> None:
    result = level(np.array([[5, 5, 5], [0, 0, 5]]), num_spares=0)
    assert (result.num_samples_per_lane, result.num_kept_shards) == (10, 2)
    result = level(np.array([[5, 5, 5], [0, 0, 0]]), num_spares=0)
    assert (result.num_samples_per_lane, result.num_kept_shards, result.num_surplus) == (7, 1, 1)
