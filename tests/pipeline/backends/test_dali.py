import gc
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from numpy.testing import assert_array_equal

from pipeline.backends import BackendOptions, UndecodableError
from pipeline.backends.dali import DaliBackend, build
from pipeline.backends.torchvision import apply, decode
from pipeline.plan import BatchPlan, plan_batch
from pipeline.reader import Reader
from pipeline.views import ViewSpec
from sharding.manifest import open_shards
from tests.sharding.conftest import build_shards, encoded, picture, write_parquet

BATCH_SIZE = 8
SPECS = ViewSpec(size=32, kernel=5), ViewSpec(size=24, blur=0, solarize=0.5)
# Chroma as stored and halved, grey, progressive, in sizes that are no multiple of a block
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("RGB", {"subsampling": 0}),
    ("RGB", {"subsampling": 2}),
    ("L", {}),
    ("RGB", {"progressive": True}),
]

Planner = Callable[..., BatchPlan]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = [(61, 83), (90, 45), (120, 160), (35, 37)]
    images = [
        encoded(picture(i, *sizes[i % 4]).convert(KINDS[i // 4 % 4][0]), quality=85, **KINDS[i // 4 % 4][1])
        for i in range(32)
    ]
    return write_parquet(tmp_path_factory.mktemp("images"), images, [0] * 32)


@pytest.fixture
def reader(source: Path, tmp_path: Path) -> Reader:
    """Of the test's own shards, which it may damage."""
    build_shards(source, tmp_path / "shards", lanes=1, shard_mb=1)
    return Reader(open_shards(tmp_path / "shards"))


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: DALI and the kernels on one are not tested")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NO_GPU)])
def backend(reader: Reader, request: pytest.FixtureRequest) -> Iterator[DaliBackend]:
    backend = build(options(reader, request.param))
    yield backend
    backend.close()


@pytest.fixture
def plan(reader: Reader) -> Planner:
    """``plan(step)``: all samples in turn; or of the samples given."""

    def make(step: int, ids: list[int] | None = None) -> BatchPlan:
        index = reader.shards.index
        rows = (np.arange(BATCH_SIZE) + step * BATCH_SIZE) % len(index) if ids is None else np.array(ids)
        sizes = index.height[rows].astype(np.int64), index.width[rows].astype(np.int64)
        return plan_batch(SPECS, 0, step, rows, np.zeros_like(rows), *sizes)

    return make


def options(reader: Reader, device: str = "cpu") -> BackendOptions:
    return BackendOptions(reader, SPECS, BATCH_SIZE, num_threads=2, prefetch=2, device=torch.device(device))


def damage(reader: Reader, sample: int, at: int, data: bytes) -> None:
    """Overwrite bytes of a sample in its shard; ``at`` below 0 counts from the sample's end.

    The index takes the new bytes for those of the build, so that it is the decoder that has to notice.
    """
    index = reader.shards.index
    shard = reader.shards.root / reader.shards.manifest.shards[index.shard[sample]].path
    start, size = int(index.offset[sample]), int(index.size[sample])
    with shard.open("r+b") as file:
        file.seek(start + at + (size if at < 0 else 0))
        file.write(data)
    checksums = index.xxh3_64.copy()
    checksums[sample] = xxhash.xxh3_64_intdigest(shard.read_bytes()[start : start + size])
    reader.shards = replace(reader.shards, index=replace(index, xxh3_64=checksums))


def truncate(reader: Reader, sample: int, num_bytes: int) -> None:
    damage(reader, sample, -num_bytes, bytes(num_bytes))


def test_equals_torchvision_on_pillow(backend: DaliBackend, plan: Planner, reader: Reader) -> None:
    for step in range(4):
        batch = plan(step)
        for views, view_plan in zip(backend.submit(batch).result(), batch.views, strict=True):
            images = [decode(reader.read(i)) for i in batch.ids]
            expected = np.stack([np.asarray(apply(image, view_plan, row)) for row, image in enumerate(images)])
            assert views.dtype == torch.uint8
            assert views.shape == expected.shape
            difference = np.abs(views.cpu().numpy().astype(int) - expected).mean(axis=(1, 2, 3))
            assert difference.max() <= 0.5


def test_batches_come_in_the_order_of_submission_and_stay_as_they_are(backend: DaliBackend, plan: Planner) -> None:
    """Also smaller ones, and while DALI decodes later ones."""
    alone = [backend.submit(plan(step)).result() for step in range(3)]
    copies = [[view.clone() for view in views] for views in alone]
    small = plan(3, [5, 3])
    pending = [backend.submit(p) for p in (plan(0), small, plan(1), plan(2))]
    results = [p.result() for p in pending]
    assert [len(views[0]) for views in results] == [BATCH_SIZE, 2, BATCH_SIZE, BATCH_SIZE]
    for views, again, copy in zip(alone, [results[0], *results[2:]], copies, strict=True):
        for view, same, before in zip(views, again, copy, strict=True):
            assert torch.equal(view, before)
            assert torch.equal(same, before)


def test_every_undecodable_sample_is_named_and_the_backend_goes_on(
    backend: DaliBackend, plan: Planner, reader: Reader
) -> None:
    good = [0, 3, 5]
    expected = [view.clone() for view in backend.submit(plan(0, good)).result()]
    truncate(reader, 1, 400)
    truncate(reader, 2, 2)
    damage(reader, 4, 0, b"<html>no image")
    pending = [backend.submit(plan(0, ids)) for ids in ([0, 1, 2, 3, 4, 5], good)]
    with pytest.raises(UndecodableError) as failure:
        pending[0].result()
    assert set(failure.value.reasons) == {1, 2, 4}
    assert all(failure.value.reasons.values())
    for view, same in zip(expected, backend.submit(plan(0, good)).result(), strict=True):
        assert torch.equal(view, same)


def test_what_was_pending_after_a_failure_is_right_or_void(backend: DaliBackend, plan: Planner, reader: Reader) -> None:
    """It depends on how far DALI was; neither hangs, and the same batch submitted again is right."""
    expected = backend.submit(plan(1)).result()[0].clone()
    truncate(reader, 1, 400)
    pending = [backend.submit(plan(step)) for step in (0, 1, 1, 1)]
    with pytest.raises(UndecodableError):
        pending[0].result()
    for batch in pending[1:]:
        try:
            views = batch.result()
        except RuntimeError as error:
            assert "step 1 is void" in str(error)  # noqa: PT017
        else:
            assert torch.equal(views[0], expected)
    assert torch.equal(backend.submit(plan(1)).result()[0], expected)


def test_a_truncated_image_is_found_whatever_its_crops(backend: DaliBackend, plan: Planner, reader: Reader) -> None:
    """Even if they need none of the rows that are missing; of every kind of JPEG."""
    corner = np.array([[0, 0, 8, 8]])
    for sample in range(0, 32, 3):
        truncate(reader, sample, 50)
        batch = plan(0, [sample])
        views = tuple(replace(view, edge=corner, box=corner.astype(np.float64)) for view in batch.views)
        with pytest.raises(UndecodableError) as failure:
            backend.submit(replace(batch, views=views)).result()
        assert set(failure.value.reasons) == {sample}


def test_an_image_of_another_size_than_the_index_says_is_not_decoded(
    backend: DaliBackend, plan: Planner, reader: Reader
) -> None:
    """A damaged size may ask for more memory than there is, or be smaller than the crops."""
    data = reader.read(3).tobytes()
    frame = data.index(b"\xff\xc0" if b"\xff\xc0" in data else b"\xff\xc2")
    damage(reader, 3, frame + 5, b"\x10\x00\x10\x00")
    with pytest.raises(UndecodableError, match="as the index says") as failure:
        backend.submit(plan(0)).result()
    assert set(failure.value.reasons) == {3}


def test_the_cpu_decodes_no_more_than_the_crops_need(plan: Planner, reader: Reader) -> None:
    batch, index = plan(0), reader.shards.index
    backend = build(options(reader))
    pending = backend.submit(batch)
    pending.result()
    backend.close()
    assert pending.regions is not None
    edges = np.stack([view.edge for view in batch.views])
    assert_array_equal(pending.regions[:, :2], edges[..., :2].min(axis=0))
    areas = pending.regions[:, 2:].prod(axis=1)
    assert areas.sum() < (index.height[batch.ids] * index.width[batch.ids]).sum()


def test_failures_leave_no_threads(plan: Planner, reader: Reader) -> None:
    """Also none that only the garbage collector would find."""
    truncate(reader, 1, 400)
    backend = build(options(reader))
    gc.disable()
    try:
        counts = []
        for _ in range(4):
            with pytest.raises(UndecodableError):
                backend.submit(plan(0)).result()
            counts.append(num_threads())
    finally:
        gc.enable()
        backend.close()
    assert counts[-1] <= counts[0]


def test_close_leaves_no_thread_and_takes_no_more_plans(reader: Reader, plan: Planner) -> None:
    before = num_threads()
    for _ in range(2):
        backend = build(options(reader))
        backend.submit(plan(0)).result()
        backend.submit(plan(1))
        backend.close()
        backend.close()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("dali")]
        with pytest.raises(RuntimeError, match="closed"):
            backend.submit(plan(2))
        del backend
    deadline = time.monotonic() + 5
    while num_threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert num_threads() <= before


def num_threads() -> int:
    """All of the process's, DALI's as well."""
    return len(list(Path("/proc/self/task").iterdir()))


def test_stats_count_seconds(backend: DaliBackend, plan: Planner) -> None:
    backend.submit(plan(0)).result()
    first = backend.stats()
    backend.submit(plan(0)).result()
    assert "decode_seconds" in first
    assert all(0 < first[name] < seconds for name, seconds in backend.stats().items())
