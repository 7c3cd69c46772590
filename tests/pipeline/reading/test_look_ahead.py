import numpy as np
import pytest

from pipeline.order import Shuffled, lane_shard_sizes
from pipeline.reading.look_ahead import LookAhead
from sharding.manifest import ShardSet


def needed(shards: ShardSet, order: Shuffled, rows: slice, steps: range) -> set[int]:
    return set().union(*(shards.index.shard[order.batch(step)[0][rows]].tolist() for step in steps))


@pytest.mark.parametrize("rows", [slice(0, 8), slice(2, 4)], ids=["all", "one lane"])
def test_looks_as_far_as_the_bytes_allow(shard_set: ShardSet, rows: slice) -> None:
    order = Shuffled(lane_shard_sizes(shard_set), 0, 8, window=1)
    sizes = np.array([shard.num_bytes for shard in shard_set.manifest.shards])
    lanes = 4 if rows.stop == 8 else 1
    limit = int(lanes * 2.2 * sizes.max())
    ahead = LookAhead(shard_set, order, rows, limit)
    for step in range(26):
        found = ahead.advance(step)
        assert sizes[found].sum() <= limit
        assert len(found) == len(set(found))
        for end in range(step + 1, step + 12):
            if sizes[list(needed(shard_set, order, rows, range(step, end)))].sum() > limit:
                break
            assert needed(shard_set, order, rows, range(step, end)) <= set(found)
        assert set(found) >= needed(shard_set, order, rows, range(step, step + 1))


def test_stops_after_a_pass(shard_set: ShardSet) -> None:
    ahead = LookAhead(shard_set, Shuffled(lane_shard_sizes(shard_set), 0, 8), slice(0, 8), 10**9)
    for _ in range(5):
        assert sorted(ahead.advance(0)) == list(range(12))
    assert len(ahead._ahead) == 12


def test_by_default_two_windows_ahead(shard_set: ShardSet) -> None:
    order = Shuffled(lane_shard_sizes(shard_set), 0, 8, window=1)
    assert 4 < len(LookAhead(shard_set, order, slice(0, 8)).advance(0)) <= 8


@pytest.mark.parametrize("window", [1, 2])
def test_needs_room_for_the_largest_window(shard_set: ShardSet, window: int) -> None:
    order = Shuffled(lane_shard_sizes(shard_set), 0, 8, window=window)
    shards = shard_set.manifest.shards
    sizes = [sorted(shard.num_bytes for shard in shards if shard.lane == lane) for lane in range(4)]
    largest = sum(sum(lane[-window:]) for lane in sizes)
    LookAhead(shard_set, order, slice(0, 8), largest)
    with pytest.raises(ValueError, match=f"shuffles among {largest} bytes .* keep {largest - 1} of them"):
        LookAhead(shard_set, order, slice(0, 8), largest - 1)
