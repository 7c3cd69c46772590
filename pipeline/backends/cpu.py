"""Views on the CPU, exactly torchvision's: libjpeg-turbo, then Numba kernels, in a pool of threads without the GIL."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipeline.backends import BackendOptions, Pending
from pipeline.backends.pool import Done, PooledBatch, chunks
from pipeline.kernels.render import render
from pipeline.kernels.resample import Pixels, as_pixels
from pipeline.memory import empty_views
from pipeline.plan import BatchPlan
from pipeline.workers import Workers


def build(options: BackendOptions) -> "CpuBackend":
    return CpuBackend(options)


class CpuBackend:
    """``num_threads`` threads, each of which decodes a sample once and renders all its views into the batch.

    ``decode_seconds`` (reading included) and those of the views in `stats` are summed over the threads: divided by
    their number and by the elapsed time they are the share of it that each stage takes; what is missing to 1 was idle.
    """

    def __init__(self, options: BackendOptions) -> None:
        self._reader = options.reader
        self._num_threads, self._device = options.num_threads, options.device
        self._pool = Workers(self._num_threads, "cpu-backend", options.reader.watch)
        self._local = threading.local()
        self._total = Done()

    def submit(self, plan: BatchPlan) -> Pending:
        views = [empty_views((len(plan), v.spec.size, v.spec.size, 3), self._device) for v in plan.views]
        arrays = [view.numpy() for view in views]
        futures = [self._pool.submit(self._work, plan, rows, arrays) for rows in chunks(len(plan), self._num_threads)]
        return PooledBatch(views, futures, self._collect)

    def stats(self) -> dict[str, float]:
        return self._total.stats()

    def close(self) -> None:
        self._pool.close()

    def _collect(self, number: int, future: Future) -> Done:  # noqa: ARG002
        done: Done = future.result()
        self._total.add(done)
        return done

    def _work(self, plan: BatchPlan, rows: slice, views: list[NDArray[np.uint8]]) -> Done:
        done = Done()
        for row in range(rows.start, rows.stop):
            sample = int(plan.ids[row])
            start = time.perf_counter()
            try:
                image = self._decode(sample)
            except ValueError as error:
                done.reasons[sample] = str(error)
                continue
            done.spend(decode=time.perf_counter() - start)
            for view, out in zip(plan.views, views, strict=True):
                done.spend(**render(image, 0, 0, view, row, out[row]))
        return done

    def _decode(self, sample: int) -> Pixels:
        index = self._reader.shards.index
        return decode(self._reader.read(sample), int(index.height[sample]), int(index.width[sample]), self._buffer)

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
