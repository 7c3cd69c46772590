"""The GPU's path proves itself: a few views of `dali`'s are made by `cpu` as well and compared.

Drivers have been seen to report images as decoded that they had skipped, so no figure of an earlier run stands for
this machine. Nothing here knows of GPUs: tests watch `dali` on the CPU, and backends that are broken on purpose.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.backends import Backend, BackendContext, DamagedSampleError, Pending, Views, build_backend
from pipeline.plan import BatchPlan
from pipeline.stats import Stats
from sharding.command import UserError

log = logging.getLogger(__name__)

# Mean absolute differences of whole chains, in levels of 255: of all images, and of the worst one. One tolerance for
# decoder and kernels together. Kernels alone are equal to the bit but for the blur. What is left for the decoder is:
# nvJPEG rounds its inverse DCT, and may interpolate halved chroma, otherwise than libjpeg, which jitter amplifies. An
# image that was skipped, or a different one, is off by tens of levels.
CHAIN_TOLERANCE = 1.0
WORST_IMAGE_TOLERANCE = 3.0

_SAMPLES_AT_START = 16
_SAMPLES_LATER = 4


def build(context: BackendContext) -> Backend:
    """What ``auto`` stands for: `cpu`, or on a GPU `dali`, watched."""
    if context.device.type == "cpu":
        return build_backend("cpu", context)
    return WatchedBackend("dali", lambda: build_backend("dali", context), context)


class WatchedBackend:
    """See `pipeline.backends.Backend`: a candidate that has to agree with `cpu`.

    Before its first batch the first samples of it are compared; if they differ, or the candidate fails in any way, a
    warning says so and `cpu` makes all batches. Later a few samples, spread over the batch, are compared in each step
    that ``canary_every`` divides; a difference there is a `UserError`, because batches since the last comparison may
    have been wrong as well. A driver that hangs is not noticed.
    """

    def __init__(self, name: str, build_candidate: Callable[[], Backend], context: BackendContext) -> None:
        self._name, self._context = name, context
        self._reference = build_backend("cpu", replace(context, num_threads=1, device=torch.device("cpu")))
        self._is_proven, self._is_watched = False, True
        try:
            self._backend = build_candidate()
        except Exception as error:  # whatever keeps it from running
            self._backend = self._fall_back(f"cannot be started: {error}")

    def submit(self, plan: BatchPlan) -> Pending:
        if not self._is_proven:
            self._prove(plan.take(slice(0, _SAMPLES_AT_START)))
        pending, every = self._backend.submit(plan), self._context.canary_every
        if not (self._is_watched and every) or plan.step % every:
            return pending
        rows = np.unique(np.linspace(0, len(plan) - 1, _SAMPLES_LATER).astype(np.int64))
        part = plan.take(rows)
        return _WatchedBatch(pending, rows, partial(self._check, part, self._reference.submit(part)))

    def stats(self) -> Stats:
        """The candidate's, or of what has taken its place."""
        return self._backend.stats()

    def close(self) -> None:
        self._reference.close()
        self._backend.close()

    def _prove(self, plan: BatchPlan) -> None:
        self._is_proven = True
        if not self._is_watched:
            return
        plan, expected = self._sound(plan)
        try:
            found = differences(self._backend.submit(plan).result(), expected)
        except Exception as error:  # whatever keeps it from running
            problem = f"fails: {error}"
        else:
            problem = _excess(found, plan)
            log.info("%s compared with cpu: %s", self._name, describe(found, plan))
        if problem:
            failed, self._backend = self._backend, self._fall_back(problem)
            failed.close()

    def _sound(self, plan: BatchPlan) -> tuple[BatchPlan, Views]:
        """The samples that can be decoded, and `cpu`'s views of them."""
        try:
            return plan, self._reference.submit(plan).result()
        except DamagedSampleError as error:
            rows = np.flatnonzero(~np.isin(plan.ids, list(error.reasons)))
        plan = plan.take(rows)
        return plan, self._reference.submit(plan).result()

    def _fall_back(self, problem: str) -> Backend:
        log.warning("%s %s; cpu, which is slower, makes the views instead", self._name, problem)
        self._is_watched = False
        return build_backend("cpu", self._context)

    def _check(self, plan: BatchPlan, reference: Pending, views: Views) -> None:
        try:
            problem = _excess(differences(views, reference.result()), plan)
        except DamagedSampleError as error:
            problem = f"took for images what cpu cannot decode: {error}"
        if problem:
            raise UserError(
                f"step {plan.step}: {self._name} {problem}. No update was made with this batch, but those of up to "
                f"{self._context.canary_every} steps before it were not compared: continue from a checkpoint of before "
                "them, with data.backend=cpu, or after updating the GPU's driver; data.canary_every=0 compares no more"
            )


class _WatchedBatch:
    """A `Pending` of which some ``rows`` have to pass a ``check``."""

    def __init__(self, pending: Pending, rows: NDArray[np.int64], check: Callable[[Views], None]) -> None:
        self._pending, self._rows, self._check = pending, rows, check

    def done(self) -> bool:
        return self._pending.done()

    def result(self, timeout: float | None = None) -> Views:
        views = self._pending.result(timeout)
        rows = torch.from_numpy(self._rows)
        self._check([view[rows.to(view.device)] for view in views])
        return views


def differences(views: Views, expected: Views) -> NDArray[np.float64]:
    """Mean absolute difference (V, n) of each view of each image, in levels of 255."""
    pairs = [
        (view.cpu().numpy().astype(np.int16), other.cpu().numpy()) for view, other in zip(views, expected, strict=True)
    ]
    return np.array([np.abs(view - other).mean(axis=(1, 2, 3)) for view, other in pairs])


def describe(found: NDArray[np.float64], plan: BatchPlan) -> str:
    """The mean of all, and the samples that are worst."""
    images = found.max(axis=0)
    worst = np.argsort(-images, kind="stable")[:3]
    samples = ", ".join(f"sample {plan.ids[row]}: {images[row]:.3g}" for row in worst)
    return f"{len(plan)} images differ by {found.mean():.3g} of 255 levels ({samples})"


def _excess(found: NDArray[np.float64], plan: BatchPlan) -> str:
    """What is wrong with views that differ from the reference by that much; "" if nothing is."""
    if not found.size or (found.mean() <= CHAIN_TOLERANCE and found.max() <= WORST_IMAGE_TOLERANCE):
        return ""
    limits = f"at most {CHAIN_TOLERANCE} on average, {WORST_IMAGE_TOLERANCE} for an image"
    return f"is wrong here: {describe(found, plan)}, expected {limits}"
