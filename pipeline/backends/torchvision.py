"""The reference: Pillow and torchvision's functional operations, exact by definition, in worker processes.

It is also the baseline of the benchmarks: what a `DataLoader` over an image folder does, with the same randomness.
"""

import functools
import io
import pickle
import time
from concurrent.futures import Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import functional as F

from pipeline.backends import BackendContext, Pending
from pipeline.backends.pool import ChunkReport, PooledBatch, chunks
from pipeline.plan import BRIGHTNESS, CONTRAST, HUE, SATURATION, Ints, ViewPlan
from pipeline.plan import BatchPlan as Plan
from pipeline.reading.reader import Reader
from pipeline.stats import Stats
from pipeline.workers import Workers

Arrays = list[NDArray[np.uint8]]

_ADJUST = {
    BRIGHTNESS: F.adjust_brightness,
    CONTRAST: F.adjust_contrast,
    SATURATION: F.adjust_saturation,
    HUE: F.adjust_hue,
}


class TorchvisionBackend:
    """``num_threads`` worker processes."""

    def __init__(self, context: BackendContext) -> None:
        self._num_workers = context.num_threads
        reader = pickle.dumps(context.reader)
        self._pool = ProcessPoolExecutor(self._num_workers, get_context("spawn"), _start_worker, (reader,))
        self._total = Stats()

    def submit(self, plan: Plan) -> Pending:
        views = [torch.empty((len(plan), v.spec.size, v.spec.size, 3), dtype=torch.uint8) for v in plan.views]
        rows = chunks(len(plan), self._num_workers)
        futures = [self._pool.submit(_work, plan.ids[r], [view.take(r) for view in plan.views]) for r in rows]

        def collect(number: int, future: Future) -> ChunkReport:
            arrays, report = future.result()
            for view, array in zip(views, arrays, strict=True):
                view[rows[number]] = torch.from_numpy(array)
            self._total += report.stats()
            return cast(ChunkReport, report)

        return PooledBatch(views, futures, collect)

    def stats(self) -> Stats:
        return self._total

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


_pickled_reader = b""  # of a worker process


def _start_worker(reader: bytes) -> None:
    global _pickled_reader
    _pickled_reader = reader
    torch.set_num_threads(1)


@functools.cache
def _reader() -> tuple[Reader, Workers]:
    """Opened with the first chunk, and not as a worker starts, where an error would be lost: the pool reports only that
    it broke. It reads in a thread of its own, which may be left behind."""
    reader: Reader = pickle.loads(_pickled_reader)
    return reader, Workers(1, "read", reader.watch)


def _read(sample: int) -> NDArray[np.uint8]:
    reader, workers = _reader()
    data = workers.submit(reader.read, sample)
    while not wait([data], reader.watch.poll_seconds).done:
        reader.watch.check()
    return cast(NDArray[np.uint8], data.result())


def _work(ids: Ints, plans: list[ViewPlan]) -> tuple[Arrays, ChunkReport]:
    report, reader = ChunkReport(), _reader()[0]
    read_before = reader.stats().read_seconds
    arrays: Arrays = [np.zeros((len(ids), p.spec.size, p.spec.size, 3), np.uint8) for p in plans]
    for row, sample in enumerate(ids.tolist()):
        start = time.perf_counter()
        try:
            image = decode(_read(sample))
        except ValueError as error:
            report.reasons[sample] = str(error)
            continue
        report.decode_seconds += time.perf_counter() - start
        for plan, array in zip(plans, arrays, strict=True):
            start = time.perf_counter()
            view = cut(image, plan, row)
            resampled = time.perf_counter()
            array[row] = np.asarray(adjust(view, plan, row))
            report.geometry_seconds += resampled - start
            report.photometric_seconds += time.perf_counter() - resampled
    report.read_seconds = reader.stats().read_seconds - read_before
    return arrays, report


def decode(data: NDArray[np.uint8]) -> Image.Image:
    """Raises ValueError."""
    try:
        return Image.open(io.BytesIO(data.tobytes())).convert("RGB")
    except OSError as error:
        raise ValueError(str(error)) from None


def apply(image: Image.Image, plan: ViewPlan, row: int) -> Image.Image:
    """Row ``row`` of a plan."""
    return adjust(cut(image, plan, row), plan, row)


def adjust(view: Image.Image, plan: ViewPlan, row: int) -> Image.Image:
    """The photometric operations."""
    if plan.jitter[row]:
        view = _jitter(view, plan, row)
    if plan.grey[row]:
        view = F.rgb_to_grayscale(view, num_output_channels=3)
    if plan.sigma[row] > 0:
        view = F.gaussian_blur(view, [plan.spec.kernel] * 2, [float(plan.sigma[row])] * 2)
    if plan.solarize[row]:
        view = F.solarize(view, 128)
    return view


def _jitter(view: Image.Image, plan: ViewPlan, row: int) -> Image.Image:
    for operation in plan.order[row]:
        factor = float(plan.factors[row, operation])
        if operation == HUE and factor == 0:  # off: `ColorJitter` leaves it out, and a shift by 0 is not exact
            continue
        view = _ADJUST[int(operation)](view, factor)
    return view


def cut(image: Image.Image, plan: ViewPlan, row: int) -> Image.Image:
    """The geometry."""
    spec = plan.spec
    mode = F.InterpolationMode(spec.interpolation)
    if spec.crop == "center":
        view = F.center_crop(F.resize(image, [spec.resize], mode, antialias=True), [spec.size])
    else:
        top, left, height, width = plan.edge[row].tolist()
        view = F.resized_crop(image, top, left, height, width, [spec.size] * 2, mode, antialias=True)
    return F.hflip(view) if plan.flip[row] else view


build = TorchvisionBackend
