"""Which source row goes into which shard: arithmetic, known before any image is read.

Rows are shuffled by the seed, cut into one equal run a lane, and each run into shards of nearly equal length.
Rows left over (fewer than one a lane) are *spares*. Images refused on the way leave holes, so that lanes end
unequal; `level` then says how many shards at the end of each lane have to be pooled, with the spares, and
dealt out again to make the lanes equal.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SPARE_LANE = -1


@dataclass(frozen=True)
class Part:
    """One shard as planned: ``rows`` are source rows in the order in which they are tried."""

    lane: int
    number: int  # of the shard in its lane
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Level:
    num_samples_per_lane: int
    num_kept_shards: int  # in each lane, from its beginning; what follows is pooled
    num_surplus: int


def shuffled_rows(num_rows: int, seed: int) -> NDArray[np.int64]:
    """A permutation of the rows: sorted by SplitMix64 (Steele et al. 2014) of (seed, row).

    Own arithmetic rather than NumPy's generator, whose permutations may change between releases (NEP 19).
    """
    start = _mix(np.array([seed], dtype=np.uint64))[0]
    with np.errstate(over="ignore"):
        states = start + np.arange(1, num_rows + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.argsort(_mix(states), kind="stable").astype(np.int64)


def plan_parts(num_rows: int, num_lanes: int, samples_per_shard: int, seed: int) -> list[Part]:
    """All shards, lanes interleaved, and last the part of the spares (`SPARE_LANE`) when there are any."""
    per_lane = num_rows // num_lanes
    rows = shuffled_rows(num_rows, seed)
    num_shards = -(-per_lane // samples_per_shard)
    lanes = [np.array_split(rows[lane * per_lane : (lane + 1) * per_lane], num_shards) for lane in range(num_lanes)]
    parts = [Part(lane, number, lanes[lane][number]) for number in range(num_shards) for lane in range(num_lanes)]
    spares = rows[num_lanes * per_lane :]
    return [*parts, Part(SPARE_LANE, 0, spares)] if len(spares) else parts


def level(counts: NDArray[np.int64], num_spares: int) -> Level:
    """How to make lanes equal, given the samples ``(num_lanes, num_shards)`` that came through.

    As few shards as possible are touched: none when all lanes are equal already.
    """
    num_lanes, num_shards = counts.shape
    per_lane, surplus = divmod(int(counts.sum()) + num_spares, num_lanes)
    if (counts.sum(axis=1) == per_lane).all():
        return Level(per_lane, num_shards, surplus)
    kept = np.concatenate([np.zeros((num_lanes, 1), np.int64), counts.cumsum(axis=1)], axis=1)
    fits = (kept[:, :num_shards] <= per_lane).all(axis=0)  # by number of kept shards, 0 always fits
    return Level(per_lane, int(np.flatnonzero(fits)[-1]), surplus)


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))
