import gc
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from numpy.testing import assert_array_equal
from nvidia.dali import fn

from pipeline.backends import BackendContext, DamagedSampleError
from pipeline.backends.dali.backend import DaliBackend, build
from pipeline.backends.dali.decode import Decoder, decode_graph, largest_size
from pipeline.backends.torchvision import decode
from pipeline.plan import BatchPlan, plan_batch
from pipeline.reading.reader import Reader
from pipeline.views import ViewSpec
from sharding.manifest import open_shards
from tests.census import wait_until
from tests.pipeline.reference import apply
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
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def backend(reader: Reader, device: str) -> Iterator[DaliBackend]:
    with closing(build(context(reader, device))) as backend:
        assert isinstance(backend, DaliBackend)
        yield backend


@pytest.fixture
def plan(reader: Reader) -> Planner:
    """``plan(step)``: all samples in turn; or of the samples given."""

    def make(step: int, ids: list[int] | None = None) -> BatchPlan:
        index = reader.shards.index
        rows = (np.arange(BATCH_SIZE) + step * BATCH_SIZE) % len(index) if ids is None else np.array(ids)
        sizes = index.height[rows].astype(np.int64), index.width[rows].astype(np.int64)
        return plan_batch(SPECS, 0, step, rows, np.zeros_like(rows), *sizes)

    return make


def context(reader: Reader, device: str = "cpu") -> BackendContext:
    return BackendContext(reader, BATCH_SIZE, num_threads=2, device=torch.device(device))


def damage(reader: Reader, samples: list[int], checksums: bool = False) -> Reader:
    """A reader of the same shards after the heads of these samples were overwritten, with their checksums made to fit
    or not. Without them, no decoder gets to see the bytes."""
    index = reader.shards.index
    fitting = index.xxh3_64.copy()
    for sample in samples:
        path = reader.shards.root / reader.shards.manifest.shards[index.shard[sample]].path
        with path.open("r+b") as file:
            file.seek(int(index.offset[sample]))
            file.write(bytes(50))
            file.seek(int(index.offset[sample]))
            fitting[sample] = xxhash.xxh3_64_intdigest(file.read(int(index.size[sample])))
    return Reader(replace(reader.shards, index=replace(index, xxh3_64=fitting)) if checksums else reader.shards)


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


def test_views_do_not_depend_on_the_rest_of_the_batch(backend: DaliBackend, plan: Planner) -> None:
    """Nor on the place in it: a slice of the batch on another rank must be the same."""
    ids = list(range(BATCH_SIZE))
    whole, turned = backend.submit(plan(0, ids)).result(), backend.submit(plan(0, ids[::-1])).result()
    parts = [backend.submit(plan(0, ids[i : i + 2])).result() for i in range(0, BATCH_SIZE, 2)]
    for view, same, *pieces in zip(whole, turned, *parts, strict=True):
        assert torch.equal(view, same.flip(0))
        assert torch.equal(view, torch.cat(pieces))


@NO_GPU
def test_a_slow_reader_on_a_gpu_finds_its_views_whole(reader: Reader, plan: Planner) -> None:
    """Neither the images' memory nor the views' serves a later batch while a stream has yet to read it."""
    with closing(build(context(reader, "cuda"))) as backend:
        expected = [[view.clone() for view in backend.submit(plan(step)).result()] for step in range(4)]
        pending = deque(backend.submit(plan(step % 4)) for step in range(3))
        for step in range(100):
            views = pending.popleft().result()
            torch.cuda._sleep(10**7)  # cycles: some milliseconds
            copies = [view.clone() for view in views]
            del views
            pending.append(backend.submit(plan((step + 3) % 4)))
            assert all(torch.equal(*pair) for pair in zip(copies, expected[step % 4], strict=True)), step


@NO_GPU
def test_images_on_a_gpu_are_kept_until_the_host_has_seen_the_views_done(reader: Reader, plan: Planner) -> None:
    """The hardware decoder writes without regard to streams, so only the host can say when their memory is free."""
    with closing(build(context(reader, "cuda"))) as backend:
        assert isinstance(backend, DaliBackend)
        stream = backend._renderer.stream
        expected = [[view.clone() for view in backend.submit(plan(step)).result()] for step in range(4)]
        for _ in range(5):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(10**8)  # cycles: the kernels start some 50 milliseconds after the images are there
            pending = [backend.submit(plan(step)) for step in range(4)]
            for batch, views in zip(pending, expected, strict=True):
                found = batch.result()
                assert all(torch.equal(*pair) for pair in zip(found, views, strict=True))
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**9)
        backend.submit(plan(0)).result()
        assert stream.query(), "the host did not wait"


@pytest.mark.parametrize("checksums", [False, True])
def test_every_undecodable_sample_is_named_and_the_backend_goes_on(
    plan: Planner, reader: Reader, device: str, checksums: bool
) -> None:
    good = [0, 3, 5]
    with closing(build(context(reader, device))) as backend:
        expected = backend.submit(plan(0, good)).result()
    with closing(build(context(damage(reader, [1, 2, 4], checksums), device))) as backend:
        pending = backend.submit(plan(0, [0, 1, 2, 3, 4, 5]))
        with pytest.raises(DamagedSampleError) as failure:
            pending.result()
        assert set(failure.value.reasons) == {1, 2, 4}
        assert all(("checksum" in reason) != checksums for reason in failure.value.reasons.values())
        assert not any("nvImageCodec" in reason for reason in failure.value.reasons.values()), "which says nothing"
        for view, same in zip(expected, backend.submit(plan(0, good)).result(), strict=True):
            assert torch.equal(view, same)


def test_a_batch_with_both_kinds_of_damage_names_both_at_once(plan: Planner, reader: Reader, device: str) -> None:
    fitting = damage(reader, [1], checksums=True)
    damage(reader, [2])
    with closing(build(context(fitting, device))) as backend, pytest.raises(DamagedSampleError) as failure:
        backend.submit(plan(0, [0, 1, 2])).result()
    assert set(failure.value.reasons) == {1, 2}


def test_what_was_pending_after_a_failure_is_right_or_void(plan: Planner, reader: Reader, device: str) -> None:
    """It depends on how far DALI was; neither hangs, and the same batch submitted again is right."""
    with closing(build(context(damage(reader, [1], checksums=True), device))) as backend:
        expected = backend.submit(plan(1)).result()[0].clone()
        pending = [backend.submit(plan(step)) for step in (0, 1, 1, 1)]
        with pytest.raises(DamagedSampleError):
            pending[0].result()
        for batch in pending[1:]:
            try:
                views = batch.result()
            except RuntimeError as error:
                assert "step 1 is void" in str(error)  # noqa: PT017
            else:
                assert torch.equal(views[0], expected)
        assert torch.equal(backend.submit(plan(1)).result()[0], expected)


def test_the_cpu_decodes_no_more_than_the_crops_need(plan: Planner, reader: Reader) -> None:
    batch, index = plan(0), reader.shards.index
    decoder = Decoder(len(batch), 1, None, largest_size(index))
    decoder.schedule([reader.read(sample) for sample in batch.ids.tolist()], batch.regions)
    sizes = np.array([np.asarray(image).shape[:2] for image in decoder.collect(None)])
    decoder.close()
    assert_array_equal(sizes, batch.regions[:, 2:])
    assert sizes.prod(axis=1).sum() < (index.height[batch.ids] * index.width[batch.ids]).sum()


def test_a_gpus_decoder_is_told_of_the_largest_image(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of a GPU cannot be built without one: what its decoder would get is caught."""
    index = reader.shards.index
    assert largest_size(index) == (int(index.height.max()), int(index.width.max())) == (120, 160)
    given: dict[str, Any] = {}
    monkeypatch.setattr(fn.decoders, "image", lambda encoded, **settings: given.update(settings) or encoded)
    decode_graph(True, largest_size(index), batch_size=1, num_threads=1, device_id=None)
    assert (given["preallocate_height_hint"], given["preallocate_width_hint"]) == (120, 160)
    assert given["hw_decoder_load"] == 1


def test_failures_leave_no_threads(plan: Planner, reader: Reader) -> None:
    """Also none that only the garbage collector would find."""
    backend = build(context(damage(reader, [1], checksums=True)))
    gc.disable()
    try:
        counts = []
        for _ in range(4):
            with pytest.raises(DamagedSampleError):
                backend.submit(plan(0)).result()
            counts.append(num_threads())
        wait_until(lambda: num_threads() <= counts[0])  # the system still shows a thread that has just ended
    finally:
        gc.enable()
        backend.close()


def test_close_leaves_no_thread_and_takes_no_more_plans(reader: Reader, plan: Planner) -> None:
    before = num_threads()
    for _ in range(2):
        backend = build(context(reader))
        backend.submit(plan(0)).result()
        left = backend.submit(plan(1))
        backend.close()
        backend.close()
        assert left.done(), "nobody waits for ever"
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("dali")]
        with pytest.raises(RuntimeError, match="closed"):
            backend.submit(plan(2))
        del backend
    wait_until(lambda: num_threads() <= before)


def num_threads() -> int:
    """All of the process's, DALI's as well."""
    return len(list(Path("/proc/self/task").iterdir()))


def test_stats_count_seconds(backend: DaliBackend, plan: Planner) -> None:
    backend.submit(plan(0)).result()
    first = backend.stats()
    backend.submit(plan(0)).result()
    for stage in ("decode_seconds", "geometry_seconds", "photometric_seconds"):
        assert 0 < getattr(first, stage) < getattr(backend.stats(), stage)
