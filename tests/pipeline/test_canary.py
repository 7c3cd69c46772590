import logging
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.backends import Backend, BackendContext, Pending, Views, build_backend
from pipeline.backends.cpu import Decoder
from pipeline.backends.cpu import build as build_cpu
from pipeline.backends.pool import ThreadedBackend
from pipeline.canary import WatchedBackend
from pipeline.kernels.render import render
from pipeline.kernels.resample import Pixels
from pipeline.loader import Loader
from pipeline.plan import BatchPlan, plan_samples
from pipeline.reading.reader import Reader
from pipeline.views import ViewSpec
from sharding.command import UserError
from sharding.manifest import ShardSet
from tests.census import census

SPECS = (ViewSpec(count=2, size=32, kernel=5), ViewSpec(size=16, scale=(0.05, 0.3), kernel=3, solarize=0.5))
BATCH_SIZE = 20


class Blackening(ThreadedBackend[Pixels]):
    """Reports a sample as decoded whose views it has left black, as drivers have been seen to do."""

    def __init__(self, context: BackendContext, row: int, from_step: int) -> None:
        super().__init__(context, Decoder(), render)
        self._row, self._from_step = row, from_step

    def submit(self, plan: BatchPlan) -> Pending:
        pending = super().submit(plan)
        return _Blackened(pending, self._row) if plan.step >= self._from_step else pending


class _Blackened:
    def __init__(self, pending: Pending, row: int) -> None:
        self._pending, self._row = pending, row

    def done(self) -> bool:
        return self._pending.done()

    def result(self, timeout: float | None = None) -> Views:
        views = self._pending.result(timeout)
        for view in views:
            view[self._row] = 0
        return views


class Failing(ThreadedBackend[Pixels]):
    def __init__(self, context: BackendContext) -> None:
        super().__init__(context, Decoder(), render)

    def submit(self, plan: BatchPlan) -> Pending:  # noqa: ARG002
        raise RuntimeError("no decoder on this device")


def context(shards: ShardSet, canary_every: int = 0) -> BackendContext:
    return BackendContext(Reader(shards), BATCH_SIZE, 2, torch.device("cpu"), canary_every)


def plan(shards: ShardSet, step: int = 0) -> BatchPlan:
    ids = (step * BATCH_SIZE + np.arange(BATCH_SIZE)) % len(shards.index)
    return plan_samples(shards, SPECS, 5, step, ids, np.zeros_like(ids))


@contextmanager
def watched(
    shards: ShardSet, build: Callable[[BackendContext], Backend], canary_every: int = 0
) -> Iterator[WatchedBackend]:
    chosen = context(shards, canary_every)
    with closing(WatchedBackend("candidate", lambda: build(chosen), chosen)) as backend:
        yield backend


def equal(first: Views, second: Views) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def expected(shards: ShardSet, step: int = 0) -> Views:
    with closing(build_backend("cpu", context(shards))) as backend:
        return backend.submit(plan(shards, step)).result()


def build_dali(context: BackendContext) -> Backend:
    return build_backend("dali", context)


def test_dali_agrees_and_goes_on(shard_set: ShardSet, caplog: pytest.LogCaptureFixture) -> None:
    before = census()
    with caplog.at_level(logging.INFO), watched(shard_set, build_dali, canary_every=2) as backend:
        for step in range(4):
            assert equal(backend.submit(plan(shard_set, step)).result(), expected(shard_set, step))
        assert "dali" in type(backend._backend).__module__
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "candidate compared with cpu: 16 images differ by " in caplog.messages[0]
    assert census() <= before


@pytest.mark.parametrize("row", [0, 15])
def test_one_black_image_at_the_start_is_reported_and_cpu_takes_over(
    shard_set: ShardSet, row: int, caplog: pytest.LogCaptureFixture
) -> None:
    before = census()
    with watched(shard_set, lambda context: Blackening(context, row, from_step=0), canary_every=1) as backend:
        for step in range(2):
            assert equal(backend.submit(plan(shard_set, step)).result(), expected(shard_set, step))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "16 images differ by" in caplog.text
    assert f"(sample {row}: " in caplog.text
    assert "cpu, which is slower, makes the views instead" in caplog.text
    assert census() <= before


def refuse(_: BackendContext) -> Backend:
    raise ImportError("it comes with the extra 'dali'")


@pytest.mark.parametrize(
    ("build", "message"),
    [(Failing, "candidate fails: no decoder on this device"), (refuse, "candidate cannot be started: it comes with")],
    ids=["submit", "build"],
)
def test_a_candidate_that_fails_is_reported_and_cpu_takes_over(
    shard_set: ShardSet,
    build: Callable[[BackendContext], Backend],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with watched(shard_set, build) as backend:
        assert equal(backend.submit(plan(shard_set)).result(), expected(shard_set))
    assert message in caplog.text


def test_a_black_image_in_the_middle_of_a_run_ends_it_by_name(shard_set: ShardSet) -> None:
    with watched(shard_set, lambda context: Blackening(context, 19, from_step=3), canary_every=3) as backend:
        for step in (0, 1, 2, 4, 5, 7):
            backend.submit(plan(shard_set, step)).result()
        for step in (3, 6):
            last = plan(shard_set, step).ids[19]
            with pytest.raises(UserError, match=rf"step {step}: .*\(sample {last}: .*data.backend=cpu.*canary_every"):
                backend.submit(plan(shard_set, step)).result()
    with watched(shard_set, lambda context: Blackening(context, 19, from_step=3)) as unwatched:
        unwatched.submit(plan(shard_set, 3)).result()


def test_a_damaged_sample_is_no_fault_of_the_candidate(damage: Callable[[int], ShardSet]) -> None:
    shards = damage(4)
    with watched(shards, build_dali) as backend:
        with pytest.raises(ValueError, match=r"sample 4: .*checksum"):
            backend.submit(plan(shards)).result()
        assert equal(backend.submit(plan(shards, 1)).result(), expected(shards, 1))
        assert "dali" in type(backend._backend).__module__


def test_the_candidate_may_not_decode_what_cpu_cannot(damage: Callable[[int], ShardSet], shard_set: ShardSet) -> None:
    """As a decoder that takes damage for an image, which no checksum shows."""
    chosen = context(damage(0), canary_every=1)
    sound = replace(chosen, reader=Reader(shard_set))
    with closing(WatchedBackend("candidate", lambda: build_cpu(sound), chosen)) as backend:
        pending = backend.submit(plan(shard_set))
        with pytest.raises(UserError, match="took for images what cpu cannot decode: sample 0"):
            pending.result()


def test_auto_is_cpu_without_a_gpu(shard_set: ShardSet) -> None:
    settings: dict[str, Any] = {"seed": 3, "global_batch_size": 8}
    with Loader(shard_set, SPECS, backend="auto", **settings) as auto, Loader(shard_set, SPECS, **settings) as cpu:
        assert isinstance(auto._backend, ThreadedBackend)
        assert equal(next(auto).views, next(cpu).views)
