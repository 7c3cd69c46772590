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
        places = np.cumsum([0, *self._reader.shards.index.size[plan.ids]])
        frames = empty_views([int(places[-1])], self._device)

        def make(device: torch.device) -> Views:
            return make_views(convert(frames.to(device, non_blocking=True), places[1:], plan), plan)

        read = partial(self._read, plan, places, frames.numpy())
        return self.spread(read, len(plan), partial(beside, self._device, make))

    def _read(self, plan: BatchPlan, places: Ints, frames: Bytes, rows: slice) -> ChunkReport:
        report, start = ChunkReport(), time.perf_counter()
        for row in range(rows.start, rows.stop):
            sample, frame = int(plan.ids[row]), frames[places[row] : places[row + 1]]
            try:
                self._reader.read(sample, frame)
                split_planes(frame, int(plan.heights[row]), int(plan.widths[row]))  # kernels trust the index
            except ValueError as error:
                report.reasons[sample] = str(error)
        report.decode_seconds = time.perf_counter() - start
        return report
