"""What every backend promises to the loader, checked on real shards."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.backends import BACKENDS, Backend, BackendContext, DamagedSampleError, Views, build_backend
from pipeline.loader import Loader
from pipeline.plan import BatchPlan, plan_samples
from pipeline.reading.reader import Reader
from pipeline.views import ViewSpec, flatten
from sharding.manifest import ShardSet, open_shards
from tests.census import census, wait_until
from tests.pipeline.test_workers import stalled_read
from tests.sharding.conftest import build_shards, encoded, write_parquet

BATCH_SIZE = 12
SPECS = (
    ViewSpec(count=2, size=48, kernel=5),
    ViewSpec(size=32, scale=(0.05, 0.3), jitter=1, grey=0, kernel=5, solarize=0.5),
)
EXECUTORS = [name for name in BACKENDS if name != "synthetic"]  # which makes views of no image


def context(shards: ShardSet, num_threads: int = 2) -> BackendContext:
    return BackendContext(Reader(shards), BATCH_SIZE, num_threads, torch.device("cpu"))


def build(name: str, context: BackendContext) -> Backend:
    try:
        return build_backend(name, context)
    except ImportError as error:
        pytest.skip(str(error))


def plan(shards: ShardSet, step: int, epoch: int = 0, size: int = BATCH_SIZE) -> BatchPlan:
    """Consecutive samples from ``step * BATCH_SIZE`` on."""
    ids = (step * BATCH_SIZE + np.arange(size, dtype=np.int64)) % len(shards.index)
    return plan_samples(shards, SPECS, 5, step, ids, np.full(size, epoch))


def equal(first: Views, second: Views) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def built(shard_set: ShardSet) -> Iterator[Callable[[str], Backend]]:
    """Backends by name, each built once."""
    backends: dict[str, Backend] = {}

    def get(name: str) -> Backend:
        if name not in backends:
            backends[name] = build(name, context(shard_set))
        return backends[name]

    yield get
    for backend in backends.values():
        backend.close()


@pytest.fixture(params=EXECUTORS)
def backend(request: pytest.FixtureRequest, built: Callable[[str], Backend]) -> Backend:
    return built(request.param)


@pytest.mark.parametrize("name", BACKENDS)
def test_views_are_uint8_of_their_specs_sizes(name: str, built: Callable[[str], Backend], shard_set: ShardSet) -> None:
    pending = built(name).submit(plan(shard_set, 0))
    views = pending.result()
    assert pending.done()
    assert [tuple(view.shape) for view in views] == [(BATCH_SIZE, s.size, s.size, 3) for s in flatten(SPECS)]
    for view in views:
        assert view.dtype == torch.uint8
        assert view.is_contiguous()
        assert view.device.type == "cpu"
        assert view.float().std() > 20


def test_delivered_views_are_not_written_again(backend: Backend, shard_set: ShardSet) -> None:
    views = backend.submit(plan(shard_set, 0)).result()
    before = [view.clone() for view in views]
    for step in range(1, 5):
        backend.submit(plan(shard_set, step)).result()
    assert equal(views, before)


def test_batches_in_the_making_do_not_disturb_each_other(backend: Backend, shard_set: ShardSet) -> None:
    alone = [backend.submit(plan(shard_set, step)).result() for step in range(3)]
    pending = [backend.submit(plan(shard_set, step)) for step in range(3)]
    assert all(equal(p.result(), views) for p, views in zip(pending, alone, strict=True))
    assert not equal(alone[0], alone[1])


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_slice_of_the_plan_gives_a_slice_of_the_views(backend: Backend, shard_set: ShardSet, world_size: int) -> None:
    whole = plan(shard_set, 1, epoch=2)
    views = backend.submit(whole).result()
    n = BATCH_SIZE // world_size
    parts = [backend.submit(whole.take(slice(r * n, (r + 1) * n))).result() for r in range(world_size)]
    assert equal(views, [torch.cat(pieces) for pieces in zip(*parts, strict=True)])


@pytest.mark.parametrize("name", EXECUTORS)
def test_threads_change_no_pixel_and_nothing_is_left_when_closed(
    name: str, built: Callable[[str], Backend], shard_set: ShardSet
) -> None:
    expected, before = built(name).submit(plan(shard_set, 3)).result(), census()
    backend = build(name, context(shard_set, num_threads=1))
    views = backend.submit(plan(shard_set, 3)).result()
    assert equal(views, expected)
    assert backend.stats().decode_seconds > 0
    assert census() > before
    backend.submit(plan(shard_set, 4))
    backend.close()
    assert census() <= before


@pytest.mark.parametrize("name", EXECUTORS)
def test_undecodable_samples_are_named_and_the_backend_lives_on(name: str, damage: Callable[[int], ShardSet]) -> None:
    bad_samples = {BATCH_SIZE + 1, BATCH_SIZE + 7, BATCH_SIZE + 8}  # the last two of one worker
    for sample in bad_samples:
        damaged = damage(sample)
    backend = build(name, context(damaged, num_threads=1))
    try:
        sound, bad, void = (backend.submit(plan(damaged, step)) for step in range(3))
        views = sound.result()
        with pytest.raises(DamagedSampleError) as caught:
            bad.result()
        del void
        assert caught.value.reasons.keys() == bad_samples
        assert all("checksum" in reason for reason in caught.value.reasons.values())
        for step in (2, 0):
            again = backend.submit(plan(damaged, step)).result()
        assert equal(again, views)
    finally:
        backend.close()


@pytest.fixture(scope="module")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Grey images of one pixel."""
    folder = tmp_path_factory.mktemp("tiny")
    images = [encoded(Image.new("RGB", (1, 1), (128, 128, 128))) for _ in range(4)]
    build_shards(write_parquet(folder / "source", images), folder / "shards", lanes=1)
    return open_shards(folder / "shards")


@pytest.mark.parametrize("name", EXECUTORS)
def test_an_image_of_one_pixel_is_enough_for_any_ratio(name: str, tiny_shards: ShardSet) -> None:
    spec = ViewSpec(size=8, ratio=(2, 4), jitter=0, blur=0)
    ids = np.arange(4)
    backend = build(name, context(tiny_shards, num_threads=1))
    try:
        (view,) = backend.submit(plan_samples(tiny_shards, [spec], 0, 0, ids, ids)).result()
    finally:
        backend.close()
    assert (view == 128).all()


@pytest.mark.parametrize("name", EXECUTORS)
def test_a_missing_shard_is_named(name: str, copied_shards: Path) -> None:
    shards = open_shards(copied_shards)
    (copied_shards / "lane-00" / "train-000000.tar").unlink()
    backend = build(name, context(shards, num_threads=1))
    try:
        with pytest.raises((OSError, ValueError), match=r"lane-00/train-000000.tar"):
            backend.submit(plan(shards, 0)).result()
    finally:
        backend.close()


@pytest.mark.parametrize("name", EXECUTORS)
def test_a_read_that_fails_ends_a_batch_whatever_others_wait_for(
    name: str, copied_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, gate, preadv = open_shards(copied_shards), threading.Event(), os.preadv
    (copied_shards / shards.manifest.shards[0].path).unlink()
    monkeypatch.setattr(os, "preadv", lambda *arguments: gate.wait() and preadv(*arguments))
    ids = np.array([0, *range(len(shards.index) - 5, len(shards.index))])
    backend = build(name, context(shards))
    try:
        with pytest.raises(OSError, match=r"lane-00/train-000000.tar"):
            backend.submit(plan_samples(shards, SPECS, 5, 0, ids, np.zeros_like(ids))).result(timeout=60)
    finally:
        gate.set()
        backend.close()


@pytest.mark.parametrize("name", EXECUTORS)
def test_a_read_that_never_returns_is_named(name: str, copied_shards: Path) -> None:
    """By `next` and by `close`, which leaves its thread behind."""
    shards, before = open_shards(copied_shards), census()
    paths = [copied_shards / shard.path for shard in shards.manifest.shards]
    stream = Loader(shards, SPECS, seed=5, global_batch_size=BATCH_SIZE, backend=name, num_threads=1, stall_seconds=1)
    next(stream)
    releases = [stalled_read(path) for path in paths]
    stream._reader._files.clear()
    with pytest.raises(OSError, match=r"lane-0.*tar: no answer for \d+ s"):
        deque(stream, maxlen=0)
    with pytest.raises(OSError, match=r"lane-0.*tar: no answer for \d+ s"):
        stream.close()
    for release in releases:
        release()
    wait_until(lambda: census() <= before)


def test_an_unknown_backend_is_refused_by_name(shard_set: ShardSet) -> None:
    with pytest.raises(ValueError, match=r"one of cpu, dali.*found 'gpu'"):
        build_backend("gpu", context(shard_set))
