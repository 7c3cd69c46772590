"""The loader: an infinite stream of batches in which ``batch(step)`` depends on (shards, views, seed, step) alone."""

import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.backends import Backend, BackendContext, DamagedSampleError, Pending, Views, build_backend
from pipeline.order import Order, Shuffled, ShuffledPart, lane_shard_sizes
from pipeline.plan import BatchPlan, plan_samples
from pipeline.reading.cache import CacheOptions
from pipeline.reading.look_ahead import LookAhead
from pipeline.reading.reader import Reader
from pipeline.stats import Stats
from pipeline.transfer import to_batch, upload
from pipeline.views import ViewSpec
from pipeline.workers import STALL_SECONDS, Watch
from sharding.command import UserError
from sharding.manifest import ShardSet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """One rank's part of the global batch of ``step``, on the loader's device.

    views   V tensors (b, 3, size, size), channels_last, normalised, of the loader's dtype
    labels  (b,) int64; -1 where the data has none
    ids     (b,) int64 sample ids
    """

    step: int
    views: list[torch.Tensor]
    labels: torch.Tensor
    ids: torch.Tensor


class Loader:
    """Iterates over the batches of steps ``start_step``, ``start_step + 1``, ...; use it as a context.

    By default in a shuffled order without end; ``order`` gives it a different one, such as `pipeline.order.Sequential`,
    of which ``global_batch_size`` and ``window`` are then a matter. ``rank`` and ``world_size`` choose a contiguous
    slice of each global batch; backend, threads, prefetch and cache change nothing but the speed. ``cache`` says where
    to keep shards that lie behind a URL. Samples that cannot be decoded are logged, counted, and replaced by others of
    their lane, the same ones whatever happened before (or left out, by a sequential order); more than
    ``max_replaced_samples`` of them are an error. So is a read without an answer for ``stall_seconds``.

    For one thread of the process that made it: threads and open files do not survive a fork.
    """

    def __init__(
        self,
        shards: ShardSet,
        specs: Sequence[ViewSpec],
        *,
        seed: int,
        global_batch_size: int = 0,
        order: Order | None = None,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        window: int | None = None,
        backend: str = "cpu",
        num_threads: int = 2,
        prefetch: int = 2,
        max_replaced_samples: int = 100,
        canary_every: int = 0,
        cache: CacheOptions | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        if not 0 <= rank < world_size:
            raise UserError(f"rank: expected 0 <= rank < world_size, found rank {rank} of {world_size}")
        if global_batch_size % world_size:
            raise UserError(
                f"global_batch_size: expected a multiple of world_size {world_size}, found {global_batch_size}"
            )
        _check_at_least({"start_step": (start_step, 0), "num_threads": (num_threads, 1), "prefetch": (prefetch, 1)})
        if order is None:
            order = Shuffled(lane_shard_sizes(shards), seed, global_batch_size, window)
        self._shards, self._specs, self._seed = shards, tuple(specs), seed
        self._device, self._dtype = device or torch.device("cpu"), dtype
        self._order: Order = order
        self._rank, self._world_size = rank, world_size
        batch_size = -(-order.global_batch_size // world_size)
        self._num_threads, self._prefetch, self._max_replaced = num_threads, prefetch, max_replaced_samples
        self._next_step, self._closed, self._process = start_step, False, os.getpid()
        self._undecodable: dict[int, str] = {}
        self._pending: deque[tuple[BatchPlan, Pending]] = deque()
        self._start, self._own = time.perf_counter(), Stats()
        self._watch = Watch(stall_seconds)
        self._reader, self._ahead = Reader(shards, cache, self._watch), self._look_ahead(cache)
        context = BackendContext(self._reader, batch_size, num_threads, self._device, canary_every)
        self._backend = build_backend(backend, context)
        self._close = weakref.finalize(self, _close, self._process, self._backend, self._reader)

    def plan(self, step: int) -> BatchPlan:
        """This rank's plan of a step, undecodable samples that are known by now replaced."""
        ids, epochs = (values[self._rows(len(values))] for values in self._order.batch(step))
        if self._undecodable:
            ids, epochs = self._order.without(ids, epochs, self._undecodable)
        return plan_samples(self._shards, self._specs, self._seed, step, ids, epochs)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise RuntimeError("the loader is closed")
        if os.getpid() != self._process:
            raise RuntimeError(
                f"this loader belongs to process {self._process}, and this is its child {os.getpid()} by a fork, which "
                "has none of its threads; make a loader in the process that uses it"
            )
        start = time.perf_counter()
        self._submit_ahead()
        num_prefetched, num_ready = len(self._pending), sum(pending.done() for _, pending in self._pending)
        plan, views = self._collect()
        copying = time.perf_counter()
        batch = self._to_batch(plan, views)
        copy_seconds = time.perf_counter() - copying
        self._submit_ahead()
        self._own += Stats(
            wait_seconds=time.perf_counter() - start,
            copy_seconds=copy_seconds,
            num_batches=1,
            num_prefetched=num_prefetched,
            num_ready=num_ready,
        )
        return batch

    def stats(self) -> Stats:
        """Totals since the start, of this rank."""
        seconds = time.perf_counter() - self._start
        elapsed = Stats(seconds, thread_seconds=self._num_threads * seconds, replaced_samples=len(self._undecodable))
        return self._own + elapsed + self._reader.stats() + self._backend.stats()

    def close(self) -> None:
        """Stop threads and processes. What was delivered stays valid. Raises OSError where a read never returns."""
        self._closed = True
        self._pending.clear()
        self._close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _look_ahead(self, cache: CacheOptions | None) -> LookAhead | None:
        """None where all shards are equally near, and any may come next."""
        order, rows = self._order, self._rows(self._order.global_batch_size)
        if not self._shards.directory.is_local and cache:  # a part is the same for all processes that share the cache
            room = cache.max_bytes if isinstance(order, ShuffledPart) else cache.ahead_bytes
            return LookAhead(self._shards, order, rows, room)
        return LookAhead(self._shards, order, rows) if isinstance(order, Shuffled) and order.window else None

    def _rows(self, size: int) -> slice:
        """This rank's part of a global batch."""
        return slice(self._rank * size // self._world_size, (self._rank + 1) * size // self._world_size)

    def _submit_ahead(self) -> None:
        while len(self._pending) < self._prefetch and self._next_step != self._order.num_steps:
            self._submit(self._next_step)
            self._next_step += 1

    def _submit(self, step: int) -> None:
        start = time.perf_counter()
        plan = self.plan(step)
        if self._ahead:
            oldest = self._pending[0][0].step if self._pending else step
            self._reader.fetch_ahead(self._ahead.advance(oldest))
        self._own += Stats(plan_seconds=time.perf_counter() - start)
        if len(plan):
            self._reader.read_ahead(plan.ids)
            self._pending.append((plan, self._backend.submit(plan)))

    def _to_batch(self, plan: BatchPlan, views: Views) -> Batch:
        labels = self._shards.index.label[plan.ids].astype(np.int64)
        return Batch(
            plan.step,
            to_batch(views, plan, self._device, self._dtype),
            upload(labels, self._device),
            upload(plan.ids, self._device),
        )

    def _collect(self) -> tuple[BatchPlan, Views]:
        while self._pending:
            plan, pending = self._pending[0]
            try:
                views = self._wait(plan.step, pending)
            except DamagedSampleError as error:
                self._report(error)
                self._rebuild()
                self._submit_ahead()
            else:
                self._pending.popleft()
                return plan, views
        raise StopIteration

    def _wait(self, step: int, pending: Pending) -> Views:
        """Says what it waits for, after a tenth of the time that a read may take and twice as long each time."""
        start, patience = time.monotonic(), self._watch.limit_seconds / 10
        while True:
            try:
                return pending.result(min(patience, self._watch.poll_seconds))
            except TimeoutError:
                if pending.done():  # since; or the error is the disk's own
                    return pending.result()
                self._watch.check()
            if (seconds := time.monotonic() - start) >= patience:
                log.warning("step %d: waiting for data for %.0f s; %s", step, seconds, self._watch.describe())
                patience *= 2

    def _rebuild(self) -> None:
        """Plan and submit again what is pending: a failed batch may have taken its successors with it."""
        steps = [plan.step for plan, _ in self._pending]
        self._pending.clear()
        for step in steps:
            self._submit(step)

    def _report(self, error: DamagedSampleError) -> None:
        for sample, reason in error.reasons.items():
            log.warning("%s %s: %s", self._order.fate, self._reader.describe(sample), reason)
        self._undecodable |= error.reasons
        if too_many := self._too_many():
            sample, reason = next(reversed(error.reasons.items()))
            raise UserError(
                f"{too_many} cannot be decoded, the last one {self._reader.describe(sample)}: {reason}; check the "
                f"shards with `python -m sharding.verify {self._shards.directory}`"
            )

    def _too_many(self) -> str:
        """Says why the run cannot go on with so many undecodable samples; "" if it can."""
        if len(self._undecodable) > self._max_replaced:
            return f"more than max_replaced_samples = {self._max_replaced} samples"
        return self._order.exhausted(self._undecodable)


def _close(process: int, backend: Backend, reader: Reader) -> None:
    if os.getpid() != process:  # the parent's, which may go on
        return
    reader.watch.closing.set()  # or the backend's threads would wait for further attempts at what fails
    try:
        backend.close()
    finally:
        reader.close()


def _check_at_least(values: Mapping[str, tuple[int, int]]) -> None:
    for name, (value, least) in values.items():
        if value < least:
            raise UserError(f"{name}: expected at least {least}, found {value}")
