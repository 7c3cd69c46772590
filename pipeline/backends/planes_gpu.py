"""Decode-free shards on a GPU: threads read the frames, the device gets them as they are stored, Triton does the rest.

It has not run on a GPU yet: only in Triton's interpreter.
"""

import time
from functools import partial

import numpy as np
import torch

from pipeline.backends import BackendContext, Views
from pipeline.backends.dali.render_gpu import make_views
from pipeline.backends.pool import Bytes, ChunkReport, Pool, PooledBatch
from pipeline.kernels.planes_gpu import convert
from pipeline.memory import empty_views
from pipeline.plan import BatchPlan, Ints
from pipeline.transfer import beside
from sharding.planes import split_planes


class PlanesBackend(Pool):
    """See `pipeline.backends.Backend`. Whoever takes a batch starts the kernels, on a stream of their own."""

    def __init__(self, context: BackendContext) -> None:
        super().__init__(context.num_threads, "planes", context.reader.watch)
        self._reader, self._device = context.reader, context.device

    def submit(self, plan: BatchPlan) -> PooledBatch:
        ends = np.cumsum(self._reader.shards.index.size[plan.ids], dtype=np.int64)
        frames = empty_views([int(ends[-1])], self._device)

        def make(device: torch.device) -> Views:
            return make_views(convert(frames.to(device, non_blocking=True), ends, plan), plan)

        read = partial(self._read, plan, ends, frames.numpy())
        return self.spread(read, len(plan), partial(beside, self._device, make))

    def _read(self, plan: BatchPlan, ends: Ints, frames: Bytes, rows: slice) -> ChunkReport:
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
