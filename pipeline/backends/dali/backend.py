"""NVIDIA DALI decodes, our kernels make the views: Numba's on the CPU, Triton's on a GPU.

A pool of threads reads. One thread drives DALI: it schedules what is read, in the order of submission and ahead of
collecting what is decoded. On a GPU everything after the encoded bytes stays there, on one stream.

The GPU's path has not run on a GPU yet: only through what it shares with the CPU, and in Triton's interpreter.
"""

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.backends import Backend, BackendContext, DamagedSampleError, Views
from pipeline.backends.cpu import build as build_cpu
from pipeline.backends.dali.decode import Decoder, Encoded, find_fault, largest_size
from pipeline.backends.pool import ChunkReport, Pool, chunks
from pipeline.kernels.render import render
from pipeline.kernels.resample import Pixels, as_pixels
from pipeline.memory import recycler
from pipeline.plan import BatchPlan
from pipeline.stats import Stats
from pipeline.workers import Workers

# Jobs of the driving thread, the most urgent first: DALI is to have work before anything is waited for.
_STOP, _SCHEDULE, _COLLECT = range(3)

_Read = tuple[dict[int, Encoded], dict[int, str]]  # the bytes of samples by id, and why there are none of others


class Renderer(Protocol):
    """Makes views of decoded images, in the background."""

    stream: Any  # CUDA stream on which it wants the images, and which is current in `start`; None on the CPU

    def start(self, images: Any, plan: BatchPlan) -> Callable[[], Views]:
        """Begin with ``images``, DALI's list of n (h, w, 3) uint8 that hold the plan's regions of the encoded ones; the
        returned function waits for the views. Raises `DamagedSampleError` for images that are too small for it."""
        ...

    def stats(self) -> Stats: ...

    def close(self) -> None: ...


@dataclass
class _Batch:
    """A batch in the making; see `pipeline.backends.Pending`."""

    plan: BatchPlan
    reads: "list[Future[_Read]]"
    encoded: dict[int, Encoded] = field(default_factory=dict)  # by id; must live until it is decoded
    decoder: Decoder | None = None  # the one that it was given to
    views: "Future[Callable[[], Views]]" = field(default_factory=Future)

    def is_read(self) -> bool:
        """Or cannot be."""
        done, not_done = wait(self.reads, 0, FIRST_EXCEPTION)
        return not not_done or any(not read.cancelled() and read.exception() for read in done)

    def done(self) -> bool:
        return self.views.done()

    def result(self, timeout: float | None = None) -> Views:
        return self.views.result(timeout)()


class DaliBackend:
    """See `pipeline.backends.Backend`."""

    def __init__(self, context: BackendContext, renderer: Renderer) -> None:
        self._context, self._renderer = context, renderer
        self._largest = largest_size(context.reader.shards.index)
        self._decoder = self._new_decoder(context.batch_size)
        self._wait_seconds = 0.0
        self._readers = Workers(context.num_threads, "dali-read", context.reader.watch)
        self._numbers = itertools.count()
        self._unscheduled: deque[_Batch] = deque()
        self._jobs: queue.PriorityQueue[tuple[int, int, _Batch | None]] = queue.PriorityQueue()
        self._thread = threading.Thread(target=self._work, name="dali", daemon=True)
        self._thread.start()

    def submit(self, plan: BatchPlan) -> _Batch:
        if not self._thread.is_alive():
            raise RuntimeError("the backend is closed")
        rows = chunks(len(plan), self._context.num_threads)
        batch = _Batch(plan, [self._readers.submit(self._read, plan.ids[part]) for part in rows])
        self._unscheduled.append(batch)
        for read in batch.reads:
            read.add_done_callback(lambda _: self._put(_SCHEDULE) if batch.is_read() else None)
        return batch

    def stats(self) -> Stats:
        """Of decoding DALI's threads cannot be asked, but all work while the driving thread waits for them; so that
        wait times their number, and reading, as for every backend."""
        decoding = self._context.num_threads * self._wait_seconds
        reading = self._context.reader.stats().read_seconds
        return self._renderer.stats() + Stats(decode_seconds=decoding + reading)

    def close(self) -> None:
        if self._thread.is_alive():
            self._put(_STOP)
            self._thread.join()
            self._renderer.close()
            self._decoder.close()
        self._readers.close()

    def _put(self, job: int, batch: _Batch | None = None) -> None:
        self._jobs.put((job, next(self._numbers), batch))

    def _work(self) -> None:
        with torch.cuda.stream(self._renderer.stream):  # and its device: both are a thread's own
            self._do_jobs()
        for batch in (*self._unscheduled, *(batch for _, _, batch in self._jobs.queue if batch)):
            batch.views.cancel()

    def _do_jobs(self) -> None:
        while (job := self._jobs.get())[0] != _STOP:
            if batch := job[2]:
                self._attempt(self._collect, batch)
            while self._unscheduled and self._unscheduled[0].is_read():
                self._attempt(self._schedule, self._unscheduled.popleft())

    def _attempt(self, task: Callable[[_Batch], None], batch: _Batch) -> None:
        try:
            task(batch)
        except Exception as error:  # the caller's, when it asks for the views
            batch.views.set_exception(error)

    def _schedule(self, batch: _Batch) -> None:
        faults: dict[int, str] = {}
        for read in wait(batch.reads, return_when=FIRST_EXCEPTION).done:
            encoded, failed = read.result()
            batch.encoded |= encoded
            faults |= failed
        if faults:
            raise DamagedSampleError(faults | self._find_faults(batch))
        batch.decoder = self._decoder
        batch.decoder.schedule([batch.encoded[i] for i in batch.plan.ids.tolist()], batch.plan.regions)
        self._put(_COLLECT, batch)

    def _read(self, ids: NDArray[np.int64]) -> _Read:
        encoded, faults = {}, {}
        for sample in ids.tolist():
            try:
                encoded[sample] = self._context.reader.read(sample)
            except ValueError as error:
                faults[sample] = str(error)
        return encoded, faults

    def _collect(self, batch: _Batch) -> None:
        if batch.decoder is not self._decoder:
            raise RuntimeError(f"the batch of step {batch.plan.step} is void: one before it failed; submit it again")
        start = time.perf_counter()
        try:
            images = self._decoder.collect(self._renderer.stream)
            self._wait_seconds += time.perf_counter() - start
        except RuntimeError as error:
            message = str(error)
        else:
            batch.views.set_result(self._renderer.start(images, batch.plan))
            return
        # Not in the handler: DALI's threads would live as long as an exception that led to this one.
        broken, self._decoder = self._decoder, self._new_decoder(self._context.batch_size)
        broken.close()
        if faults := self._find_faults(batch):
            raise DamagedSampleError(faults)
        raise RuntimeError(f"DALI: {message}")

    def _find_faults(self, batch: _Batch) -> dict[int, str]:
        """Decodes every image of a failed batch alone; id -> reason of those that fail."""
        plan, faults, decoder = batch.plan, {}, self._new_decoder(1)
        for sample, height, width in zip(plan.ids.tolist(), plan.heights, plan.widths, strict=True):
            if sample in batch.encoded and (fault := find_fault(decoder, batch.encoded[sample], height, width)):
                faults[sample] = fault
                decoder = self._new_decoder(1)
        return faults

    def _new_decoder(self, batch_size: int) -> Decoder:
        device = self._context.device
        on_gpu = device.type == "cuda"
        device_id = (device.index or 0) if on_gpu else None
        return Decoder(batch_size, self._context.num_threads, device_id, self._largest)


class CpuRenderer(Pool):
    """Numba kernels on threads of their own, next to DALI's."""

    stream = None

    def start(self, images: Any, plan: BatchPlan) -> Callable[[], Views]:
        shapes = [(len(plan), view.spec.size, view.spec.size, 3) for view in plan.views]
        views = [recycler.empty(shape, torch.uint8) for shape in shapes]
        outs = [view.numpy() for view in views]
        return self.spread(partial(_render_rows, images, plan, outs), len(plan), lambda: views).result


def _render_rows(images: Any, plan: BatchPlan, outs: list[NDArray[np.uint8]], rows: slice) -> ChunkReport:
    """Some rows of all views; copying DALI's image into the kernels' layout counts as geometry."""
    report = ChunkReport()
    for row in range(rows.start, rows.stop):
        start = time.perf_counter()
        image = _pack(np.asarray(images[row]))
        report.geometry_seconds += time.perf_counter() - start
        top, left = plan.regions[row, :2].tolist()
        report.render(plan, row, outs, partial(render, image, top=top, left=left))
    return report


def _pack(image: NDArray[np.uint8]) -> Pixels:
    """A copy as the kernels want it."""
    memory = np.empty(image.size + 1, np.uint8)
    memory[:-1] = image.reshape(-1)
    return as_pixels(memory, *image.shape[:2])


def build(context: BackendContext) -> Backend:
    """Planes need no decoder: `cpu` makes their views on a CPU, Triton kernels on a GPU."""
    is_decode_free, on_gpu = context.reader.shards.manifest.is_decode_free, context.device.type == "cuda"
    if is_decode_free and on_gpu:
        from pipeline.backends.planes_gpu import PlanesBackend  # imports Triton

        return PlanesBackend(context)
    if is_decode_free:
        return build_cpu(context)
    if on_gpu:
        from pipeline.backends.dali.render_gpu import GpuRenderer  # likewise

        return DaliBackend(context, GpuRenderer(context.device))
    return DaliBackend(context, CpuRenderer(context.num_threads, "dali-views", context.reader.watch))
