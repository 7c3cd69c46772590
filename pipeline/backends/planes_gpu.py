"""Decode-free shards on a GPU: threads read the frames, the device gets them as they are stored, Triton does the rest.

It has not run on a GPU yet: only in Triton's interpreter.
"""

import time
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.backends import BackendContext, Views
from pipeline.backends.dali.render_gpu import make_views
from pipeline.backends.pool import ChunkReport, PooledBatch, chunks
from pipeline.kernels.planes_gpu import convert
from pipeline.memory import empty_views
from pipeline.plan import BatchPlan, Ints
from pipeline.stats import Stats
from pipeline.transfer import beside
from pipeline.workers import Workers
from sharding.planes import split_planes


class PlanesBackend:
    """See `pipeline.backends.Backend`. Whoever takes a batch starts the kernels, on a stream of their own."""

    def __init__(self, context: BackendContext) -> None:
        self._reader, self._device, self._num_threads = context.reader, context.device, context.num_threads
        self._threads = Workers(context.num_threads, "planes", context.reader.watch)
        self._total = Stats()

    def submit(self, plan: BatchPlan) -> PooledBatch:
        ends = np.cumsum(self._reader.shards.index.size[plan.ids], dtype=np.int64)
        frames = empty_views([int(ends[-1])], self._device)
        parts = chunks(len(plan), self._num_threads)
        reads = [self._threads.submit(self._read, plan, rows, ends, frames.numpy()) for rows in parts]

        def make(device: torch.device) -> Views:
            return make_views(convert(frames.to(device, non_blocking=True), ends, plan), plan)

        return PooledBatch(partial(beside, self._device, make), reads, self._collect)

    def stats(self) -> Stats:
        """Of reading; measuring the kernels would make the host wait for each."""
        return self._total

    def close(self) -> None:
        self._threads.close()

    def _collect(self, report: ChunkReport) -> None:
        self._total += report.stats()

    def _read(self, plan: BatchPlan, rows: slice, ends: Ints, frames: NDArray[np.uint8]) -> ChunkReport:
        report, start = ChunkReport(), time.perf_counter()
        for row in range(rows.start, rows.stop):
            try:
                data = self._reader.read(int(plan.ids[row]))
                split_planes(data, int(plan.heights[row]), int(plan.widths[row]))  # kernels trust the index
            except ValueError as error:
                report.reasons[int(plan.ids[row])] = str(error)
            else:
                frames[ends[row] - data.size : ends[row]] = data
        report.decode_seconds = time.perf_counter() - start
        return report
