"""NVIDIA DALI decodes, our kernels make the views: Numba's on the CPU, Triton's on a GPU.

DALI's own resize, jitter and hue differ from torchvision's (see docs/log.md), so its graph ends at the decoded image.
One thread drives the pipeline: it schedules what was submitted, ahead of collecting what is decoded.

Nothing here has run on a GPU yet except through the parts that it shares with the CPU and Triton's interpreter.
"""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import simplejpeg
import torch
from numba import njit, uint32
from numpy.typing import NDArray
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline, pipeline_def

from pipeline.backends import BackendOptions, UndecodableError, Views
from pipeline.plan import BatchPlan
from pipeline.render import render
from pipeline.transfer import empty

Encoded = NDArray[np.uint8]
Regions = NDArray[np.int32]  # (n, 4) top, left, height, width

_END_OF_IMAGE = bytes((0xFF, 0xD9))
# Jobs of the driving thread, the most urgent first: DALI is to have work before anything is waited for.
_STOP, _SCHEDULE, _COLLECT = range(3)


class Renderer(Protocol):
    """Makes views of decoded images, in the background."""

    stream: Any  # CUDA stream on which it wants the images; None on the CPU

    def start(self, images: Any, regions: Regions, plan: BatchPlan) -> Callable[[], Views]:
        """Begin with ``images``, DALI's list of n (h, w, 3) uint8 that hold the ``regions`` of the encoded ones; the
        returned function waits for the views."""
        ...

    def stats(self) -> dict[str, float]: ...

    def close(self) -> None: ...


@pipeline_def
def decode_graph(on_gpu: bool) -> Any:
    """Encoded bytes to RGB, once, as Pillow decodes them: exact chroma upsampling, orientation as stored.

    The CPU decodes no more than the region that the views need. The GPU decodes all: decoding a region there bypasses
    the hardware decoder (DALI's documentation) and crashes with nvImageCodec 0.9 (nvImageCodec #55).
    """
    encoded = fn.external_source(name="encoded", no_copy=True, dtype=types.DALIDataType.UINT8, ndim=1)
    how: dict[str, Any] = {"output_type": types.DALIImageType.RGB, "adjust_orientation": False}
    if on_gpu:
        return fn.decoders.image(encoded, device="mixed", jpeg_fancy_upsampling=True, **how)
    start = fn.external_source(name="start", dtype=types.DALIDataType.INT32, ndim=1)
    shape = fn.external_source(name="shape", dtype=types.DALIDataType.INT32, ndim=1)
    return fn.decoders.image_slice(encoded, start=start, shape=shape, axes=(0, 1), **how)


class Decoder:
    """A DALI pipeline: batches go in and come out in the same order. One failure and it is of no more use."""

    def __init__(self, batch_size: int, num_threads: int, device_id: int | None) -> None:
        self._on_gpu = device_id is not None
        # The dynamic executor queues any number of runs; the depth is only how many runs the first one starts.
        self._pipeline: Pipeline = decode_graph(
            self._on_gpu,
            batch_size=batch_size,
            num_threads=num_threads,
            device_id=device_id,
            prefetch_queue_depth=1,
        )
        self._pipeline.build()

    def regions(self, encoded: Sequence[Encoded], plan: BatchPlan, sizes: Regions) -> Regions:
        """What to decode of each image.

        A truncated file must be found whatever its crops are, so that batches do not depend on who looked at it
        before; an end marker tells that all rows are there, without it the whole image is decoded.
        """
        if self._on_gpu:
            return sizes
        edges = np.stack([view.edge for view in plan.views]).astype(np.int32)
        start, end = edges[..., :2].min(axis=0), (edges[..., :2] + edges[..., 2:]).max(axis=0)
        complete = np.array([data[-2:].tobytes() == _END_OF_IMAGE for data in encoded])
        return np.where(complete[:, None], np.concatenate([start, end - start], axis=1), sizes)

    def schedule(self, encoded: list[Encoded], regions: Regions) -> None:
        """Start decoding. ``encoded`` is not copied: it must live until `collect` has returned its images."""
        self._pipeline.feed_input("encoded", encoded)
        if not self._on_gpu:
            self._pipeline.feed_input("start", np.ascontiguousarray(regions[:, :2]))
            self._pipeline.feed_input("shape", np.ascontiguousarray(regions[:, 2:]))
        self._pipeline.schedule_run()

    def collect(self, stream: Any) -> Any:
        """The next batch of images; they live as long as they are referred to. Raises RuntimeError."""
        (images,) = self._pipeline.share_outputs(stream)
        self._pipeline.release_outputs()
        return images


@dataclass
class _Batch:
    """A batch in the making; see `pipeline.backends.Pending`."""

    plan: BatchPlan
    encoded: list[Encoded] = field(default_factory=list)
    regions: Regions | None = None
    decoder: Decoder | None = None  # the one that it was given to
    views: "Future[Callable[[], Views]]" = field(default_factory=Future)

    def result(self) -> Views:
        return self.views.result()()


class DaliBackend:
    """See `pipeline.backends.Backend`."""

    def __init__(self, options: BackendOptions, renderer: Renderer) -> None:
        self._options, self._renderer = options, renderer
        self._decoder = self._new_decoder(options.batch_size)
        self._decode_seconds = 0.0
        self._numbers = itertools.count()
        self._jobs: queue.PriorityQueue[tuple[int, int, _Batch]] = queue.PriorityQueue()
        self._thread = threading.Thread(target=self._work, name="dali", daemon=True)
        self._thread.start()

    def submit(self, plan: BatchPlan) -> _Batch:
        if not self._thread.is_alive():
            raise RuntimeError("the backend is closed")
        batch, number = _Batch(plan), next(self._numbers)
        for job in (_SCHEDULE, _COLLECT):
            self._jobs.put((job, number, batch))
        return batch

    def stats(self) -> dict[str, float]:
        """``decode_seconds``: of the driving thread, scheduling and waiting for decoded images."""
        return {"decode_seconds": self._decode_seconds, **self._renderer.stats()}

    def close(self) -> None:
        if self._thread.is_alive():
            self._jobs.put((_STOP, next(self._numbers), _Batch(BatchPlan(0, np.empty(0, np.int64), ()))))
            self._thread.join()
            self._renderer.close()
            del self._decoder

    def _work(self) -> None:
        while True:
            job, _, batch = self._jobs.get()
            if job == _STOP:
                break
            start = time.perf_counter()
            try:
                if not batch.views.done():
                    self._schedule(batch) if job == _SCHEDULE else self._collect(batch)
            except Exception as error:
                batch.views.set_exception(error)
            self._decode_seconds += time.perf_counter() - start
        while not self._jobs.empty():
            self._jobs.get()[2].views.cancel()

    def _schedule(self, batch: _Batch) -> None:
        ids = batch.plan.ids
        batch.encoded = [self._options.reader.read(int(i)) for i in ids]
        sizes = self._sizes(ids)
        if any(_header_fault(data, size) for data, size in zip(batch.encoded, sizes, strict=True)):
            raise UndecodableError(self._find_faults(batch))
        batch.decoder, batch.regions = self._decoder, self._decoder.regions(batch.encoded, batch.plan, sizes)
        batch.decoder.schedule(batch.encoded, batch.regions)

    def _collect(self, batch: _Batch) -> None:
        if batch.decoder is not self._decoder or batch.regions is None:
            raise RuntimeError(f"the batch of step {batch.plan.step} is void: one before it failed; submit it again")
        try:
            images = self._decoder.collect(self._renderer.stream)
        except RuntimeError as error:
            self._decoder = self._new_decoder(self._options.batch_size)
            if faults := self._find_faults(batch):
                raise UndecodableError(faults) from None
            raise RuntimeError(f"DALI: {error}") from error
        batch.views.set_result(self._renderer.start(images, batch.regions, batch.plan))

    def _find_faults(self, batch: _Batch) -> dict[int, str]:
        """Decodes every image of a failed batch alone; id -> reason of those that fail."""
        ids, sizes = batch.plan.ids, self._sizes(batch.plan.ids)
        faults, decoder = {}, self._new_decoder(1)
        for sample, data, size in zip(ids.tolist(), batch.encoded, sizes, strict=True):
            if fault := _header_fault(data, size):
                faults[sample] = fault
                continue
            try:
                decoder.schedule([data], size[None])
                decoder.collect(None)
            except RuntimeError as error:
                faults[sample] = _complaint(data) or str(error)
                decoder = self._new_decoder(1)
        return faults

    def _sizes(self, ids: NDArray[np.int64]) -> Regions:
        """Whole images, as the index has them."""
        index = self._options.reader.shards.index
        zeros = np.zeros(len(ids), np.int32)
        return np.stack([zeros, zeros, index.height[ids], index.width[ids]], axis=1)

    def _new_decoder(self, batch_size: int) -> Decoder:
        device = self._options.device
        on_gpu = device.type == "cuda"
        return Decoder(batch_size, self._options.num_threads, (device.index or 0) if on_gpu else None)


def _header_fault(data: Encoded, size: NDArray[np.int32]) -> str:
    """Why not to let DALI try: no JPEG, or of another size than the index says (and so than memory is bounded by)."""
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        return str(error)
    expected_height, expected_width = size[2:]
    if (height, width) == (expected_height, expected_width):
        return ""
    return f"expected {expected_width} x {expected_height} pixels as in the index, found {width} x {height}"


def _complaint(data: Encoded) -> str:
    """What libjpeg has to say about a damaged file; DALI's own message is a number."""
    try:
        simplejpeg.decode_jpeg(data)
    except ValueError as error:
        return str(error)
    return ""


class CpuRenderer:
    """Numba kernels on threads of their own, next to DALI's."""

    stream = None

    def __init__(self, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="dali-views")
        self._num_tasks = 4 * num_threads  # a batch; more than threads, so that they finish together
        self._seconds = 0.0

    def start(self, images: Any, regions: Regions, plan: BatchPlan) -> Callable[[], Views]:
        shapes = [(len(plan), view.spec.size, view.spec.size, 3) for view in plan.views]
        views = [empty(shape, torch.uint8, torch.device("cpu")) for shape in shapes]
        outs = [view.numpy() for view in views]
        parts = np.array_split(np.arange(len(plan)), self._num_tasks)
        tasks = [self._pool.submit(_render_rows, images, regions, plan, rows, outs) for rows in parts]

        def wait() -> Views:
            self._seconds += sum(task.result() for task in tasks)
            return views

        return wait

    def stats(self) -> dict[str, float]:
        """``views_seconds``: of all threads."""
        return {"views_seconds": self._seconds}

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _render_rows(
    images: Any, regions: Regions, plan: BatchPlan, rows: NDArray[np.int64], outs: list[NDArray[np.uint8]]
) -> float:
    """Some rows of all views; returns the seconds that it took."""
    start = time.perf_counter()
    for row in rows.tolist():
        image = _pack(np.asarray(images[row]))
        top, left = regions[row, :2].tolist()
        for view, out in zip(plan.views, outs, strict=True):
            render(image, top, left, view, row, out[row])
    return time.perf_counter() - start


@njit(nogil=True, cache=True)
def _pack(image: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """(h, w, 3) uint8 as the kernels want it: (h, w) uint32, RGBX."""
    packed = np.empty(image.shape[:2], np.uint32)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            r, g, b = uint32(image[y, x, 0]), uint32(image[y, x, 1]), uint32(image[y, x, 2])
            packed[y, x] = r | g << uint32(8) | b << uint32(16)
    return packed


def build(options: BackendOptions) -> DaliBackend:
    if options.device.type == "cuda":
        from pipeline.render_gpu import GpuRenderer  # needs Triton, which needs a GPU

        return DaliBackend(options, GpuRenderer(options.device))
    return DaliBackend(options, CpuRenderer(options.num_threads))
