import itertools
from collections.abc import Callable

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy.stats import chisquare

from pipeline.loader import Loader
from pipeline.order import Sequential, Shuffled, ShuffledPart, lanes_of_rank
from pipeline.random import permute
from pipeline.views import ViewSpec
from sharding.manifest import ShardSet

UNEVEN = ((7, 5, 8), (4, 4, 12), (20,), (1, 18, 1))  # four lanes of 20 samples


def stream(order: Shuffled, num_steps: int, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The ids (steps * B,) of consecutive steps and their passes."""
    ids, epochs = zip(*(order.batch(step) for step in range(first, first + num_steps)), strict=True)
    return np.concatenate(ids), np.concatenate(epochs)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000])
def test_permute_is_a_permutation(size: int) -> None:
    assert_array_equal(np.sort(permute(np.arange(size), size, (1, 2), 3, 4)), np.arange(size))


def test_permute_depends_on_key_stream_and_epoch_alone() -> None:
    positions = np.arange(100)
    base = permute(positions, 100, (1, 2), 3, 4)
    assert_array_equal(permute(positions[40:], 100, (1, 2), 3, 4), base[40:])
    for other in [((9, 2), 3, 4), ((1, 2), 9, 4), ((1, 2), 3, 9)]:
        assert (permute(positions, 100, *other) != base).mean() > 0.9


@pytest.mark.parametrize("positions", [(0,), (7,), (0, 1), (3, 17)])
def test_permute_is_uniform(positions: tuple[int, ...]) -> None:
    """Where one position goes, and where two go together, over many keys."""
    size = 20
    images = np.array([permute(np.array(positions), size, (key, 0), 0, 0) for key in range(8000)])
    cells = np.ravel_multi_index(tuple(images.T), (size,) * len(positions))
    possible = [p for p in itertools.product(range(size), repeat=len(positions)) if len(set(p)) == len(p)]
    counts = np.bincount(cells, minlength=size ** len(positions))
    expected = np.ravel_multi_index(tuple(np.array(possible).T), (size,) * len(positions))
    assert counts.sum() == counts[expected].sum()
    assert chisquare(counts[expected]).pvalue > 0.01


@pytest.mark.parametrize("window", [None, 1, 2, 5])
@pytest.mark.parametrize("batch_size", [4, 12, 80, 200])
def test_every_sample_exactly_once_a_pass(window: int | None, batch_size: int) -> None:
    order = Shuffled(UNEVEN, seed=3, global_batch_size=batch_size, window=window)
    ids, epochs = stream(order, 6 * 80 // batch_size + 3)
    for epoch in range(epochs.max()):
        assert_array_equal(np.sort(ids[epochs == epoch]), np.arange(80))


@pytest.mark.parametrize("window", [None, 2])
def test_any_step_at_any_time(window: int | None) -> None:
    order = Shuffled(UNEVEN, seed=3, global_batch_size=12, window=window)
    ids, epochs = stream(order, 30)
    late_ids, late_epochs = Shuffled(UNEVEN, seed=3, global_batch_size=12, window=window).batch(23)
    assert_array_equal(late_ids, ids[23 * 12 : 24 * 12])
    assert_array_equal(late_epochs, epochs[23 * 12 : 24 * 12])


def test_a_batch_has_equal_parts_of_all_lanes_in_their_order() -> None:
    """So that a rank whose slice covers whole lanes reads only their shards."""
    ids, _ = Shuffled(UNEVEN, seed=0, global_batch_size=12).batch(5)
    assert_array_equal(ids // 20, np.repeat(np.arange(4), 3))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12])
def test_a_rank_reads_the_lanes_of_its_slice_only(world_size: int) -> None:
    order = Shuffled(UNEVEN, seed=1, global_batch_size=24)
    for rank, ids in enumerate(np.split(order.batch(7)[0], world_size)):
        assert set((ids // 20).tolist()) == set(lanes_of_rank(4, rank, world_size))


def test_passes_lanes_and_seeds_are_ordered_differently() -> None:
    def orders(seed: int) -> list[np.ndarray]:
        ids, epochs = stream(Shuffled(((50,), (50,)), seed, global_batch_size=100), 2)
        return [ids[(epochs == e) & (ids // 50 == lane)] % 50 for e in range(2) for lane in range(2)]

    for one, other in itertools.combinations(orders(0) + orders(1), 2):
        assert (one == other).mean() < 0.3


def test_a_window_reads_whole_shards_at_a_time() -> None:
    sizes = (10,) * 12
    ids, _ = stream(Shuffled((sizes,), seed=1, global_batch_size=10, window=3), 12)
    windows = (ids // 10).reshape(4, 30)
    assert all(len(np.unique(shards)) == 3 for shards in windows)
    assert len(np.unique(windows)) == 12
    assert len(np.unique(ids[:10] // 10)) > 1, "shards of a window are mixed"


def test_windows_shuffle_shards_and_their_samples_anew_in_every_pass_lane_and_seed() -> None:
    sizes = (5,) * 12
    shards, samples = [], []
    for seed in (0, 1):
        ids, _ = stream(Shuffled((sizes, sizes), seed, global_batch_size=120, window=1), 2)
        for lane in ids.reshape(4, 12, 5) % 60:  # of two passes
            shards.append(lane[:, 0] // 5)
            samples.append(lane % 5)
            assert len(np.unique(lane % 5, axis=0)) > 6, "windows are ordered alike"
            assert (shards[-1] != np.arange(12)).any(), "shards come as they lie"
    for some in (shards, samples):
        for one, other in itertools.combinations(some, 2):
            assert (one == other).mean() < 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 6}, "multiple of the 4 lanes"),
        ({"global_batch_size": 0}, "global_batch_size"),
        ({"window": 0}, "window"),
        ({"shard_sizes": ((3,), (4,))}, "equally many"),
        ({"shard_sizes": ((0,), (0,))}, "at least one"),
    ],
)
def test_refuses_what_cannot_be_ordered(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shuffled(**{"shard_sizes": UNEVEN, "seed": 0, "global_batch_size": 4, **changes})


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_a_sequence_is_read_once_on_any_number_of_processes(shard_set: ShardSet, world_size: int) -> None:
    ids = np.random.default_rng(0).permutation(92)[:45]
    found = []
    for rank in range(world_size):
        order = Sequential(ids, global_batch_size=10)
        with Loader(
            shard_set, [ViewSpec(size=8, blur=0)], seed=0, order=order, rank=rank, world_size=world_size
        ) as stream:
            found += [sample for batch in stream for sample in batch.ids.tolist()]
    assert sorted(found) == sorted(ids.tolist())


def test_a_sequence_leaves_out_what_cannot_be_decoded(damage: Callable[[int], ShardSet]) -> None:
    for bad in (3, 17, 18):
        shards = damage(bad)
    order = Sequential(np.array([1, 3, 17, 18, 4]), global_batch_size=2)
    with Loader(shards, [ViewSpec(size=8, blur=0)], seed=0, order=order) as stream:
        assert [batch.ids.tolist() for batch in stream] == [[1], [4]]
        assert stream.stats().replaced_samples == 3
    with (
        Loader(shards, [ViewSpec(size=8, blur=0)], seed=0, order=Sequential(np.array([3, 17]), 2)) as stream,
        pytest.raises(ValueError, match="all 2 samples cannot be decoded"),
    ):
        next(stream)


def test_three_billion_samples_overflow_nothing() -> None:
    per_lane = 375_000_000
    order = Shuffled(((100_000_000, 275_000_000),) * 8, 0, 8 * 4096)
    for step in (0, per_lane // 4096, 10 * per_lane // 4096):
        ids, epochs = order.batch(step)
        assert len(np.unique(ids)) == len(ids)
        assert np.array_equal(ids // per_lane, np.repeat(np.arange(8), 4096))
        assert ids.max() > 2**31
        assert epochs.max() == ((step + 1) * 4096 - 1) // per_lane
    assert abs(ids.mean() / (8 * per_lane) - 0.5) < 0.01


def test_a_part_is_seen_whole_in_every_pass_and_nothing_else() -> None:
    chosen = np.array([3, 5, 8, 21, 22, 34, 55])
    order = ShuffledPart(chosen, seed=1, global_batch_size=4)
    ids, epochs = (np.concatenate(both) for both in zip(*map(order.batch, range(7)), strict=True))
    for epoch in range(4):
        assert sorted(ids[epochs == epoch]) == chosen.tolist()
    assert len({tuple(ids[epochs == epoch]) for epoch in range(4)}) > 1, "each pass has its own order"
    assert ShuffledPart(chosen, seed=2, global_batch_size=4).batch(0)[0].tolist() != ids[:4].tolist()


def test_undecodable_samples_of_a_part_are_replaced_by_others_of_it() -> None:
    chosen = np.array([3, 5, 8, 21])
    order = ShuffledPart(chosen, seed=1, global_batch_size=4)
    ids, epochs = order.batch(0)
    replaced, _ = order.without(ids, epochs, {5, 21})
    assert set(replaced) <= {3, 8}
    assert replaced[np.isin(ids, [3, 8])].tolist() == ids[np.isin(ids, [3, 8])].tolist()
    assert order.exhausted({3, 5}) == ""
    assert order.exhausted(set(chosen.tolist())) == "all 4 samples that were chosen"
