"""Views on the CPU, exactly torchvision's: libjpeg-turbo, then Numba kernels, in a pool of threads without the GIL."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipeline.backends import BackendContext, Pending
from pipeline.backends.pool import ChunkReport, PooledBatch, chunks
from pipeline.kernels.render import render
from pipeline.kernels.resample import Pixels, as_pixels
from pipeline.memory import empty_views
from pipeline.plan import BatchPlan
from pipeline.stats import Stats
from pipeline.workers import Workers


class CpuBackend:
    """``num_threads`` threads, each of which decodes a sample once and renders all its views into the batch."""

    def __init__(self, context: BackendContext) -> None:
        self._reader = context.reader
        self._num_threads, self._device = context.num_threads, context.device
        self._pool = Workers(self._num_threads, "cpu-backend", context.reader.watch)
        self._local = threading.local()
        self._total = Stats()

    def submit(self, plan: BatchPlan) -> Pending:
        views = [empty_views((len(plan), v.spec.size, v.spec.size, 3), self._device) for v in plan.views]
        arrays = [view.numpy() for view in views]
        futures = [self._pool.submit(self._work, plan, rows, arrays) for rows in chunks(len(plan), self._num_threads)]
        return PooledBatch(views, futures, self._collect)

    def stats(self) -> Stats:
        return self._total

    def close(self) -> None:
        self._pool.close()

    def _collect(self, number: int, future: Future) -> ChunkReport:  # noqa: ARG002
        report: ChunkReport = future.result()
        self._total += report.stats()
        return report

    def _work(self, plan: BatchPlan, rows: slice, views: list[NDArray[np.uint8]]) -> ChunkReport:
        report = ChunkReport()
        for row in range(rows.start, rows.stop):
            sample = int(plan.ids[row])
            start = time.perf_counter()
            try:
                data = self._reader.read(sample)
                image = decode(data, int(plan.heights[row]), int(plan.widths[row]), self._buffer)
            except ValueError as error:
                report.reasons[sample] = str(error)
                continue
            report.decode_seconds += time.perf_counter() - start
            for view, out in zip(plan.views, views, strict=True):
                geometry, photometric = render(image, 0, 0, view, row, out[row])
                report.geometry_seconds += geometry
                report.photometric_seconds += photometric
        return report

    def _buffer(self, size: int) -> NDArray[np.uint8]:
        """This thread's own, grown to the largest image seen."""
        if getattr(self._local, "buffer", np.empty(0)).size < size:
            self._local.buffer = np.empty(size, np.uint8)
        return self._local.buffer[:size]


def decode(data: NDArray[np.uint8], height: int, width: int, buffer: Callable[[int], NDArray[np.uint8]]) -> Pixels:
    """Raises ValueError for anything but a whole, clean JPEG of the given size."""
    memory = buffer(3 * height * width + 1)
    image = simplejpeg.decode_jpeg(data, buffer=memory[:-1])
    if image.shape[:2] != (height, width):
        raise ValueError(f"expected {height} x {width} pixels as the index says, found {image.shape[:2]}")
    return as_pixels(memory, height, width)


build = CpuBackend
