import io
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import simplejpeg
import torch
from numpy.testing import assert_array_equal
from PIL import Image

from pipeline.backends import BackendContext, DamagedSampleError, Views
from pipeline.backends.cpu import Decoder, build
from pipeline.backends.pool import PooledBatch, ThreadedBackend
from pipeline.backends.torchvision import decode as pictured
from pipeline.kernels.resample import Pixels
from pipeline.plan import BatchPlan, plan_samples
from pipeline.reading.reader import Reader
from pipeline.stats import Stats
from pipeline.views import PRESETS, ViewSpec, flatten, preset
from sharding.manifest import ShardSet
from tests.census import wait_until
from tests.pipeline.reference import apply

SPECS = ViewSpec(size=40, kernel=9), ViewSpec(size=32, kernel=5, solarize=0.5)


def plan_of(shards: ShardSet, ids: list[int] | range, specs: tuple[ViewSpec, ...] = SPECS) -> BatchPlan:
    rows = np.array(ids)
    return plan_samples(shards, specs, 0, 0, rows, np.zeros_like(rows))


def backend_of(shards: ShardSet, num_threads: int = 2) -> ThreadedBackend[Pixels]:
    return build(BackendContext(Reader(shards), 16, num_threads, torch.device("cpu")))


def render(shards: ShardSet, plan: BatchPlan, num_threads: int = 2) -> Views:
    backend = backend_of(shards, num_threads)
    try:
        return backend.submit(plan).result()
    finally:
        backend.close()


@pytest.mark.parametrize("name", PRESETS)
def test_views_are_torchvisions(shard_set: ShardSet, name: str) -> None:
    specs = preset(name)
    plan = plan_of(shard_set, range(0, 92, 9), specs)
    reader = Reader(shard_set)
    images = [pictured(reader.read(int(sample))) for sample in plan.ids]
    views = render(shard_set, plan)
    assert [tuple(v.shape) for v in views] == [(len(plan), s.size, s.size, 3) for s in flatten(specs)]
    for view, view_plan in zip(views, plan.views, strict=True):
        assert view.dtype == torch.uint8
        assert view.is_contiguous()
        for row, image in enumerate(images):
            difference = np.abs(view[row].numpy().astype(int) - np.asarray(apply(image, view_plan, row)))
            assert difference.max() <= 1, "of ties in the blur"
            assert difference.mean() < 0.01


def test_threads_do_not_change_a_pixel(shard_set: ShardSet) -> None:
    plan = plan_of(shard_set, range(37))
    for one, many in zip(render(shard_set, plan, 1), render(shard_set, plan, 3), strict=True):
        assert torch.equal(one, many)


def test_a_batch_of_one(shard_set: ShardSet) -> None:
    (alone, _), (among, _) = (render(shard_set, plan_of(shard_set, ids)) for ids in ([5], range(10)))
    assert torch.equal(alone[0], among[5])


def test_pending_batches_do_not_disturb_each_other(shard_set: ShardSet) -> None:
    backend = backend_of(shard_set)
    plans = [plan_of(shard_set, range(i, i + 16)) for i in range(4)]
    pending = [backend.submit(plan) for plan in plans]
    for plan, batch in zip(plans, pending, strict=True):
        assert torch.equal(batch.result()[0], render(shard_set, plan)[0])
    backend.close()


def test_views_of_all_sizes_come_from_one_decode(shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, decode = [], simplejpeg.decode_jpeg

    def counted(data: np.ndarray, *how: object, **more: object) -> np.ndarray:
        decoded.append(len(data))
        return decode(data, *how, **more)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", counted)
    render(shard_set, plan_of(shard_set, range(10), preset("dino")))
    assert sorted(decoded) == sorted(shard_set.index.size[:10].tolist())


def test_decoding_is_exact(shard_set: ShardSet) -> None:
    reader, index = Reader(shard_set), shard_set.index
    for sample in range(0, 92, 5):
        data = reader.read(sample)
        pixels = Decoder()(data, int(index.height[sample]), int(index.width[sample]))
        ours = np.ascontiguousarray(pixels).view(np.uint8).reshape(*pixels.shape, 4)[..., :3]
        assert_array_equal(ours, np.asarray(Image.open(io.BytesIO(bytes(data))).convert("RGB")))


def test_all_undecodable_samples_are_named(damage: Callable[[int], ShardSet]) -> None:
    damage(3)
    shards = damage(11)
    backend = backend_of(shards)
    with pytest.raises(DamagedSampleError, match="sample 3: ") as raised:
        backend.submit(plan_of(shards, range(16))).result()
    assert set(raised.value.reasons) == {3, 11}
    sound = [i for i in range(16) if i not in (3, 11)]
    assert len(backend.submit(plan_of(shards, sound)).result()[0]) == 14
    backend.close()


def test_a_truncated_jpeg_is_an_error(shard_set: ShardSet) -> None:
    data, index = Reader(shard_set).read(0), shard_set.index
    for part in (0.5, 0.9, 0.99):
        with pytest.raises(ValueError, match=r"Premature end|truncated|corrupt"):
            Decoder()(data[: int(len(data) * part)], int(index.height[0]), int(index.width[0]))


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("side", ["height", "width"])
def test_another_size_than_planned_for_is_an_error(shard_set: ShardSet, side: str, change: int) -> None:
    index = shard_set.index
    wrong = replace(shard_set, index=replace(index, **{side: getattr(index, side) + change}))
    with pytest.raises(DamagedSampleError, match="sample 0: "):
        render(wrong, plan_of(wrong, [0]))


def test_close_leaves_no_thread(shard_set: ShardSet) -> None:
    before = set(threading.enumerate())
    backend = backend_of(shard_set, 3)
    for _ in range(4):
        backend.submit(plan_of(shard_set, range(92)))
    backend.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(RuntimeError):
        backend.submit(plan_of(shard_set, [0]))


def test_stats_are_seconds_by_stage(shard_set: ShardSet) -> None:
    backend = backend_of(shard_set)
    assert backend.stats() == Stats()
    backend.submit(plan_of(shard_set, range(40))).result()
    stats = backend.stats()
    assert min(stats.decode_seconds, stats.geometry_seconds, stats.photometric_seconds) > 0
    backend.close()


def test_stats_tell_geometry_from_photometric_operations(shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blur takes several times as long as the resize."""
    monkeypatch.setattr("time.perf_counter", time.thread_time)  # of this work alone, whatever else the cores do
    backend = backend_of(shard_set, 1)
    plan = plan_of(shard_set, range(40), (ViewSpec(size=200, jitter=0, grey=0, blur=1, sigma=(2, 2)),))
    backend.submit(plan).result()  # loads the compiled kernels
    before = backend.stats()
    backend.submit(plan).result()
    spent = backend.stats() - before
    backend.close()
    assert spent.photometric_seconds > spent.geometry_seconds


def test_a_batch_is_done_when_all_of_it_is(shard_set: ShardSet) -> None:
    backend = backend_of(shard_set, 1)
    pending = backend.submit(plan_of(shard_set, range(92)))
    assert isinstance(pending, PooledBatch)
    wait_until(pending.done)
    assert all(future.done() for future in pending._futures)
    backend.close()
