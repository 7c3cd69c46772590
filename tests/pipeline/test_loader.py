import gc
import itertools
import logging
import os
from collections import deque
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from numpy.testing import assert_array_equal

from pipeline.loader import Batch, Loader
from pipeline.plan import plan_batch
from pipeline.reading.reader import Reader
from pipeline.views import ViewSpec
from sharding.manifest import ShardError, ShardSet, open_shards
from tests.census import census, wait_until
from tests.pipeline.reading.test_reader import num_open_files

SPECS = (ViewSpec(count=2, size=32, kernel=5), ViewSpec(size=16, scale=(0.05, 0.3), kernel=5))
BATCH_SIZE = 8


def loader(shards: ShardSet, **options: Any) -> Loader:
    return Loader(shards, SPECS, **{"seed": 3, "global_batch_size": BATCH_SIZE, **options})


def batches(shards: ShardSet, count: int, **options: Any) -> list[Batch]:
    with loader(shards, **options) as stream:
        return [next(stream) for _ in range(count)]


def equal(first: Batch, second: Batch) -> bool:
    same = first.step == second.step and torch.equal(first.ids, second.ids)
    return same and all(torch.equal(a, b) for a, b in zip(first.views, second.views, strict=True))


def all_equal(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(map(equal, first, second))


@pytest.fixture(scope="module")
def whole(shard_set: ShardSet) -> list[Batch]:
    """Steps 0 to 25, two passes and more over the 92 samples."""
    return batches(shard_set, 26)


def test_batches_are_normalised_tensors_with_labels_and_ids(whole: list[Batch], shard_set: ShardSet) -> None:
    for number, batch in enumerate(whole):
        assert batch.step == number
        assert [tuple(view.shape) for view in batch.views] == [(BATCH_SIZE, 3, s, s) for s in (32, 32, 16)]
        assert batch.labels.tolist() == shard_set.index.label[batch.ids.numpy()].tolist()
        assert batch.labels.dtype == batch.ids.dtype == torch.int64
    views = torch.cat([batch.views[0] for batch in whole])
    assert views.dtype == torch.float32
    assert whole[0].views[0].is_contiguous(memory_format=torch.channels_last)
    low, high = (
        -torch.tensor(SPECS[0].mean) / torch.tensor(SPECS[0].std),
        (1 - torch.tensor(SPECS[0].mean)) / torch.tensor(SPECS[0].std),
    )
    assert torch.allclose(views.amin((0, 2, 3)), low, atol=0.05)
    assert torch.allclose(views.amax((0, 2, 3)), high, atol=0.05)


def test_the_dtype_can_be_chosen(shard_set: ShardSet, whole: list[Batch]) -> None:
    (batch,) = batches(shard_set, 1, dtype=torch.bfloat16)
    assert torch.equal(batch.views[0], whole[0].views[0].bfloat16())


def test_every_pass_holds_every_sample_once(whole: list[Batch]) -> None:
    per_lane = torch.stack([batch.ids for batch in whole[:23]]).reshape(23, 4, 2).transpose(0, 1).reshape(4, 46)
    for lane in per_lane:
        first, second = lane[:23], lane[23:]
        assert first.sort().values.equal(second.sort().values)
        assert not first.equal(second)
    assert torch.cat([lane[:23] for lane in per_lane]).sort().values.tolist() == list(range(92))


def test_views_are_planned_by_seed_pass_and_size_of_the_images(shard_set: ShardSet) -> None:
    with loader(shard_set) as stream:
        found = stream.plan(25)
    sizes = (values[found.ids].astype(np.int64) for values in (shard_set.index.height, shard_set.index.width))
    expected = plan_batch(SPECS, 3, 25, found.ids, np.full(BATCH_SIZE, 2), *sizes)  # the third pass
    for view, wanted in zip(found.views, expected.views, strict=True):
        for field in fields(view):
            if field.name != "spec":
                assert_array_equal(getattr(view, field.name), getattr(wanted, field.name))


def test_a_batch_may_be_larger_than_a_pass(shard_set: ShardSet) -> None:
    with loader(shard_set, global_batch_size=200) as stream:
        batch = next(stream)
    counts = np.bincount(batch.ids.numpy(), minlength=92)
    assert set(counts.tolist()) == {2, 3}
    twice = np.flatnonzero(batch.ids == int(batch.ids[0]))
    assert not torch.equal(batch.views[0][twice[0]], batch.views[0][twice[1]]), "another pass, other views"


@pytest.mark.parametrize(
    "options",
    [{"num_threads": 1}, {"num_threads": 3, "prefetch": 5}, {"prefetch": 1}, {"backend": "dali"}],
    ids=["one thread", "many", "one ahead", "dali"],
)
def test_threads_prefetch_and_backend_change_nothing_but_speed(
    shard_set: ShardSet, whole: list[Batch], options: dict[str, Any]
) -> None:
    found = batches(shard_set, 4, **options)
    for batch, expected in zip(found, whole, strict=False):
        assert torch.equal(batch.ids, expected.ids)
        for view, other in zip(batch.views, expected.views, strict=True):
            # Another decoder may round otherwise.
            torch.testing.assert_close(view, other, rtol=0, atol=0.03 if "backend" in options else 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: copies to one are not tested")
def test_a_slow_gpu_gets_the_batches_of_the_cpu(shard_set: ShardSet, whole: list[Batch]) -> None:
    """Pinned memory serves the next batch only after it was copied."""
    with loader(shard_set, device=torch.device("cuda")) as stream:
        for expected, batch in zip(whole, stream, strict=False):
            torch.cuda._sleep(10**7)  # cycles: some milliseconds
            assert batch.ids.is_cuda
            assert batch.labels.is_cuda
            assert torch.equal(batch.ids.cpu(), expected.ids)
            for view, same in zip(batch.views, expected.views, strict=True):
                torch.testing.assert_close(view.cpu(), same, atol=1e-5, rtol=0)


def test_starts_at_any_step(shard_set: ShardSet, whole: list[Batch]) -> None:
    for step in (1, 11, 23):
        assert all_equal(batches(shard_set, 2, start_step=step), whole[step : step + 2])


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("window", [None, 1])
def test_ranks_share_the_global_batch(shard_set: ShardSet, world_size: int, window: int | None) -> None:
    whole = batches(shard_set, 3, window=window)
    ranks = [batches(shard_set, 3, window=window, rank=r, world_size=world_size) for r in range(world_size)]
    for step, batch in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        assert torch.cat([part.ids for part in parts]).tolist() == batch.ids.tolist()
        assert len(set(batch.ids.tolist())) == BATCH_SIZE
        for view in range(3):
            assert torch.cat([part.views[view] for part in parts]).equal(batch.views[view])


def test_ranks_read_their_own_lanes_only(shard_set: ShardSet) -> None:
    for rank in range(4):
        ids = torch.cat([batch.ids for batch in batches(shard_set, 5, rank=rank, world_size=4)])
        assert set((ids // 23).tolist()) == {rank}


def test_a_window_keeps_to_its_shards_and_changes_the_order(shard_set: ShardSet, whole: list[Batch]) -> None:
    found = batches(shard_set, 23, window=1)
    assert sorted(torch.cat([b.ids for b in found[:11]]).tolist()) != sorted(
        torch.cat([b.ids for b in whole[:11]]).tolist()
    )
    lane = torch.cat([batch.ids[:2] for batch in found])[:23].numpy()
    visited = shard_set.index.shard[lane]
    assert len(np.flatnonzero(np.diff(visited))) == len(set(visited.tolist())) - 1


def test_the_disk_is_told_ahead_what_will_be_read(shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a backend that reads nothing itself."""
    samples: list[np.ndarray] = []
    shards: list[list[int]] = []
    monkeypatch.setattr(Reader, "read_ahead", lambda _, ids: samples.append(ids))
    monkeypatch.setattr(Reader, "fetch_ahead", lambda _, rows: shards.append(rows))
    with loader(shard_set, window=1, prefetch=3, backend="synthetic") as stream:
        found = [next(stream).ids.tolist() for _ in range(4)]
    assert [ids.tolist() for ids in samples[:4]] == found
    assert len(samples) == len(shards) == 4 + 3
    for number, rows in enumerate(shards):
        not_done = np.concatenate(samples[max(0, number - 2) : number + 1])
        assert set(shard_set.index.shard[not_done].tolist()) <= set(rows)
    batches(shard_set, 1, backend="synthetic")
    assert len(shards) == 4 + 3, "without a window any shard may come next"


# Faults


def a_sample_of(batch: Batch) -> int:
    return int(batch.ids[3])


def test_a_damaged_sample_is_reported_and_replaced_from_its_lane(
    damage: Callable[[int], ShardSet], whole: list[Batch], caplog: pytest.LogCaptureFixture
) -> None:
    bad = a_sample_of(whole[2])
    with caplog.at_level(logging.WARNING), loader(damage(bad)) as stream:
        found = [next(stream) for _ in range(4)]
        assert stream.stats().replaced_samples == 1
    assert caplog.messages[0].startswith(f"replaced sample {bad} (lane-0")
    assert "checksum" in caplog.messages[0]
    assert len(caplog.messages) == 1
    assert all_equal([found[0], found[1], found[3]], [whole[0], whole[1], whole[3]])
    changed = np.flatnonzero(found[2].ids != whole[2].ids).tolist()
    assert changed == [3]
    assert int(found[2].ids[3]) // 23 == bad // 23
    others = [0, 1, 2, 4, 5, 6, 7]
    assert all(torch.equal(a[others], b[others]) for a, b in zip(found[2].views, whole[2].views, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_who_meets_a_fault_late_goes_on_as_if_it_had_always_known(
    damage: Callable[[int], ShardSet], whole: list[Batch], backend: str
) -> None:
    bad = [a_sample_of(whole[step]) for step in (0, 2, 5)]
    for sample in bad:
        shards = damage(sample)
    run = batches(shards, 26, backend=backend, prefetch=3)
    again = [step for step in range(6, 24) if any(sample in whole[step].ids for sample in bad)]
    assert len(again) >= 3  # they come back in the next pass
    for start in (1, 2, 3, *again):
        assert all_equal(batches(shards, 2, backend=backend, start_step=start), run[start : start + 2])
    assert all(sample not in batch.ids for sample in bad for batch in run)


def test_the_reference_replaces_the_same_samples(damage: Callable[[int], ShardSet], whole: list[Batch]) -> None:
    shards = damage(a_sample_of(whole[1]))
    expected, run = batches(shards, 3), batches(shards, 3, backend="torchvision")
    assert [batch.ids.tolist() for batch in run] == [batch.ids.tolist() for batch in expected]
    assert run[1].ids[3] != whole[1].ids[3]
    for ours, theirs in zip(expected[1].views, run[1].views, strict=True):
        assert (ours - theirs).abs().mean() < 0.01


@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_what_only_the_decoder_refuses_is_replaced_as_well(
    copied_shards: Path, whole: list[Batch], backend: str
) -> None:
    """Its checksum fits, so DALI fails on it, and takes the batches that follow with it."""
    bad = a_sample_of(whole[1])
    shards = without_head(copied_shards, bad)
    run = batches(shards, 4, backend=backend, prefetch=3)
    assert all_equal([run[0]], batches(open_shards(copied_shards), 1, backend=backend))
    assert np.flatnonzero(run[1].ids != whole[1].ids).tolist() == [3]
    for start in (1, 2):
        assert all_equal(batches(shards, 2, backend=backend, start_step=start), run[start : start + 2])


def without_head(root: Path, sample: int) -> ShardSet:
    """The shards, with a sample that is no JPEG, as if they had been built so."""
    shards = open_shards(root)
    index, checksums = shards.index, shards.index.xxh3_64.copy()
    with (root / shards.manifest.shards[int(index.shard[sample])].path).open("r+b") as file:
        file.seek(int(index.offset[sample]))
        file.write(bytes(50))
        file.seek(int(index.offset[sample]))
        checksums[sample] = xxhash.xxh3_64_intdigest(file.read(int(index.size[sample])))
    return replace(shards, index=replace(index, xxh3_64=checksums))


def test_replacements_do_not_depend_on_the_world_size(damage: Callable[[int], ShardSet], whole: list[Batch]) -> None:
    for batch in whole[:2]:
        shards = damage(a_sample_of(batch))
    expected = batches(shards, 3)
    ranks = [batches(shards, 3, rank=rank, world_size=2) for rank in range(2)]
    for step, batch in enumerate(expected):
        assert torch.cat([rank[step].ids for rank in ranks]).tolist() == batch.ids.tolist()


def test_replacements_are_drawn_anew_by_sample_pass_attempt_and_seed(shard_set: ShardSet) -> None:
    with loader(shard_set) as stream, loader(shard_set, seed=4) as of_another_seed:

        def draw(stream: Any, epoch: int = 0, attempt: int = 0) -> np.ndarray:
            return np.array([stream._order._replacement(sample, epoch, attempt) for sample in range(92)])

        base = draw(stream)
        assert (base // 23 == np.arange(92) // 23).all()
        assert len(set(base.tolist())) > 46, "of 58 expected"
        for other in (draw(stream, epoch=1), draw(stream, attempt=1), draw(of_another_seed)):
            assert (base == other).mean() < 0.2


def test_replacements_of_replacements(damage: Callable[[int], ShardSet], whole: list[Batch]) -> None:
    bad = a_sample_of(whole[0])
    first = int(batches(damage(bad), 1)[0].ids[3])
    (batch,) = batches(damage(first), 1)
    assert int(batch.ids[3]) not in (bad, first)
    assert int(batch.ids[3]) // 23 == bad // 23


def test_too_many_damaged_samples_stop_the_run(damage: Callable[[int], ShardSet], whole: list[Batch]) -> None:
    for sample in whole[1].ids.tolist()[:3]:
        shards = damage(sample)
    before = census()
    with pytest.raises(ValueError, match=r"max_replaced_samples = 2 .*the last one sample .*lane-.*sharding.verify"):
        batches(shards, 3, max_replaced_samples=2)
    assert census() <= before
    assert len(batches(shards, 3, max_replaced_samples=3)) == 3


def test_a_lane_without_a_decodable_sample_ends_the_run_by_name(copied_shards: Path) -> None:
    shards = open_shards(copied_shards)
    for path in copied_shards.glob("lane-01/*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ValueError, match=r"all 23 samples of lane 1 cannot be decoded, the last one .*sharding.verify"):
        batches(shards, 26)


@pytest.mark.parametrize("harm", [os.remove, lambda path: os.truncate(path, 5000)], ids=["missing", "truncated"])
def test_a_harmed_shard_is_refused_by_name_before_anything_is_read(
    copied_shards: Path, harm: Callable[[Path], None]
) -> None:
    harm(copied_shards / "lane-02" / "train-000001.tar")
    with pytest.raises(ShardError, match=r"lane-02/train-000001.tar: expected \d+ bytes"):
        open_shards(copied_shards)


def test_a_shard_truncated_under_a_run_ends_it_by_name(copied_shards: Path) -> None:
    before = census()
    with loader(open_shards(copied_shards), backend="cpu") as stream:
        next(stream)
        for path in copied_shards.glob("lane-01/*.tar"):
            os.truncate(path, 600)
        with pytest.raises(OSError, match=r"lane-01/train-.*truncated"):
            deque(stream, maxlen=0)
    assert census() <= before


# Lifetime, statistics, arguments


def test_close_leaves_nothing_and_delivered_batches_live_on(shard_set: ShardSet, whole: list[Batch]) -> None:
    before = census()
    stream = loader(shard_set, window=2)
    batch = next(stream)
    assert census() > before
    stream.close()
    assert census() <= before
    assert not equal(batch, whole[0])  # of another order
    with pytest.raises(RuntimeError, match="closed"):
        next(stream)


@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_a_dropped_loader_closes_itself(shard_set: ShardSet, backend: str) -> None:
    gc.collect()  # what other tests dropped
    before, files = census(), num_open_files()
    stream = loader(shard_set, backend=backend)
    next(stream)
    assert census() > before
    del stream
    gc.collect()
    wait_until(lambda: census() <= before)
    assert num_open_files() <= files


@pytest.mark.filterwarnings("ignore:.*use of fork")
@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_a_forked_child_is_told_to_make_its_own(shard_set: ShardSet, backend: str) -> None:
    with loader(shard_set, backend=backend) as stream:
        next(stream)
        child = os.fork()
        if not child:
            try:
                next(stream)
            except RuntimeError as error:
                stream.close()
                os._exit(f"belongs to process {os.getppid()}" not in str(error))
            os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        assert next(stream).step == 1


def test_statistics_account_for_the_time(shard_set: ShardSet) -> None:
    with loader(shard_set) as stream:
        sums = [stream.stats()]
        for _ in range(10):
            next(stream)
            sums.append(stream.stats())
    stats = sums[-1]
    for before, after in itertools.pairwise(sums):
        spent = after - before
        assert spent.num_batches == 1
        assert min(spent.plan_seconds, spent.copy_seconds) > 0
        assert spent.seconds > spent.wait_seconds > spent.plan_seconds + spent.copy_seconds
        assert spent.thread_seconds == pytest.approx(2 * spent.seconds)
        assert 0 <= spent.num_ready <= spent.num_prefetched == 2
    assert min(stats.decode_seconds, stats.read_seconds, stats.geometry_seconds, stats.photometric_seconds) > 0


def test_the_queue_is_full_when_training_is_slow(shard_set: ShardSet) -> None:
    with loader(shard_set, prefetch=2) as stream:
        next(stream)
        for _ in range(5):
            wait_until(lambda: all(pending.done() for _, pending in stream._pending))
            next(stream)
        assert stream.stats().num_prefetched == 12
        assert stream.stats().num_ready >= 10  # all but the first two


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 3}, "global_batch_size: expected a multiple of world_size 3, found 8"),
        ({"rank": 2, "world_size": 2}, "rank: expected 0 <= rank < world_size, found rank 2 of 2"),
        ({"global_batch_size": 6}, "expected a positive multiple of the 4 lanes"),
        ({"prefetch": 0}, "prefetch: expected at least 1, found 0"),
        ({"num_threads": 0}, "num_threads: expected at least 1"),
        ({"start_step": -1}, "start_step: expected at least 0"),
        ({"window": 0}, "window: expected at least one shard"),
        ({"backend": "magic"}, "backend: expected one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_refused(shard_set: ShardSet, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader(shard_set, **options)
