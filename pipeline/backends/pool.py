"""Backends of threads, each of which decodes a sample once and renders all its views into the batch."""

import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.backends import BackendContext, DamagedSampleError, Pending, Views
from pipeline.memory import empty_views
from pipeline.plan import BatchPlan, Ints, ViewPlan
from pipeline.stats import Stats
from pipeline.workers import Watch, Workers

Bytes = NDArray[np.uint8]
Image = TypeVar("Image")  # decoded, as a backend wants it
# Makes a row of a view's plan of some image, into (size, size, 3) uint8; returns the seconds of geometry and of
# photometric operations.
Render = Callable[[ViewPlan, int, Bytes], tuple[float, float]]

_CHUNKS_PER_THREAD = 4  # so that the last thread of a batch is not far behind the others


@dataclass
class ChunkReport:
    """What a thread says of a chunk: why samples are damaged, by id, and its seconds by stage, as those of `Stats`."""

    reasons: dict[int, str] = field(default_factory=dict)
    decode_seconds: float = 0.0
    geometry_seconds: float = 0.0
    photometric_seconds: float = 0.0

    def render(self, plan: BatchPlan, row: int, outs: list[Bytes], render: Render) -> None:
        """A row of all views, by ``render``."""
        for view, out in zip(plan.views, outs, strict=True):
            geometry, photometric = render(view, row, out[row])
            self.geometry_seconds += geometry
            self.photometric_seconds += photometric

    def stats(self) -> Stats:
        return Stats(
            decode_seconds=self.decode_seconds,
            geometry_seconds=self.geometry_seconds,
            photometric_seconds=self.photometric_seconds,
        )


def chunks(num_rows: int, num_threads: int) -> list[slice]:
    """Slices of nearly equal length that cover the rows of a batch."""
    count = min(num_rows, num_threads * _CHUNKS_PER_THREAD)
    return [slice(i * num_rows // count, (i + 1) * num_rows // count) for i in range(count)]


class PooledBatch:
    """A `Pending` whose chunks are ``futures``; ``collect`` is told of each report, ``views`` called after all."""

    def __init__(
        self, views: Callable[[], Views], futures: "list[Future[ChunkReport]]", collect: Callable[[ChunkReport], None]
    ) -> None:
        self._views, self._futures, self._collect = views, futures, collect

    def done(self) -> bool:
        return all(future.done() for future in self._futures)

    def result(self, timeout: float | None = None) -> Views:
        done, not_done = wait(self._futures, timeout, FIRST_EXCEPTION)
        for future in done:
            future.result()  # what ends a chunk ends the batch, whatever the others still wait for
        if not_done:
            raise TimeoutError
        reasons: dict[int, str] = {}
        for future in self._futures:
            report = future.result()
            self._collect(report)
            reasons |= report.reasons
        if reasons:
            raise DamagedSampleError(reasons)
        return self._views()


class Pool:
    """Threads that share the rows of batches, and the totals of what they report."""

    def __init__(self, num_threads: int, name: str, watch: Watch) -> None:
        self._num_threads, self._threads = num_threads, Workers(num_threads, name, watch)
        self._total = Stats()

    def spread(self, work: Callable[[slice], ChunkReport], num_rows: int, views: Callable[[], Views]) -> PooledBatch:
        """Begin to ``work`` on the rows of a batch."""
        futures = [self._threads.submit(work, rows) for rows in chunks(num_rows, self._num_threads)]
        return PooledBatch(views, futures, self._collect)

    def stats(self) -> Stats:
        return self._total

    def close(self) -> None:
        self._threads.close()

    def _collect(self, report: ChunkReport) -> None:
        self._total += report.stats()


class ThreadedBackend(Pool, Generic[Image]):
    """See `pipeline.backends.Backend`.

    ``decode`` makes an image of a sample's bytes, a height, a width and the region that is needed, or raises
    ValueError. ``render`` is a `Render` that takes the image first.
    """

    def __init__(
        self,
        context: BackendContext,
        decode: Callable[[Bytes, int, int, Ints], Image],
        render: Callable[[Image, ViewPlan, int, Bytes], tuple[float, float]],
    ) -> None:
        super().__init__(context.num_threads, "views", context.reader.watch)
        self._context, self._decode, self._render = context, decode, render

    def submit(self, plan: BatchPlan) -> Pending:
        views = [empty_views((len(plan), v.spec.size, v.spec.size, 3), self._context.device) for v in plan.views]
        return self.spread(partial(self._work, plan, [view.numpy() for view in views]), len(plan), lambda: views)

    def _work(self, plan: BatchPlan, outs: list[Bytes], rows: slice) -> ChunkReport:
        report = ChunkReport()
        for row in range(rows.start, rows.stop):
            sample, start = int(plan.ids[row]), time.perf_counter()
            try:
                size = int(plan.heights[row]), int(plan.widths[row])
                image = self._decode(self._context.reader.read(sample), *size, plan.regions[row])
            except ValueError as error:
                report.reasons[sample] = str(error)
                continue
            report.decode_seconds += time.perf_counter() - start
            report.render(plan, row, outs, partial(self._render, image))
        return report
