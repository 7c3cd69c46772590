"""The loader: an infinite stream of batches in which ``batch(step)`` depends on (shards, views, seed, step) alone."""

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch

from pipeline.backends import BackendOptions, Pending, UndecodableError, Views, build_backend
from pipeline.order import Ids, Order
from pipeline.plan import BatchPlan, plan_batch
from pipeline.random import key_from_seed, philox, to_integer
from pipeline.reader import Reader
from pipeline.transfer import to_batch
from pipeline.views import ViewSpec, flatten
from sharding.manifest import ShardSet

log = logging.getLogger(__name__)

# The third counter word of the draws that choose replacements of undecodable samples; see `pipeline.order`.
_REPLACEMENT_STREAM = (1 << 31) - 1


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
    """Iterates over the batches of steps ``start_step``, ``start_step + 1``, ... without end; use it as a context.

    ``rank`` and ``world_size`` choose a contiguous slice of each global batch; backend, threads and prefetch change
    nothing but the speed. Samples that cannot be decoded are logged, counted, and replaced by others of their lane,
    the same ones whatever happened before; more than ``max_replaced_samples`` of them are an error.
    """

    def __init__(
        self,
        shards: ShardSet,
        specs: Sequence[ViewSpec],
        *,
        seed: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        window: int | None = None,
        backend: str = "cpu",
        num_threads: int = 2,
        prefetch: int = 2,
        max_replaced_samples: int = 100,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if global_batch_size % world_size:
            raise ValueError(
                f"global_batch_size: expected a multiple of world_size {world_size}, found {global_batch_size}"
            )
        self._shards, self._specs, self._seed = shards, tuple(specs), seed
        self._device, self._dtype = device or torch.device("cpu"), dtype
        self._order = Order(lane_shard_sizes(shards), seed, global_batch_size, window)
        batch_size = global_batch_size // world_size
        self._rows = slice(rank * batch_size, (rank + 1) * batch_size)
        self._reader = Reader(shards)
        self._prefetch, self._max_replaced = prefetch, max_replaced_samples
        self._undecodable: dict[int, str] = {}
        self._next_step, self._wait_seconds, self._num_batches = start_step, 0.0, 0
        self._pending: deque[tuple[BatchPlan, Pending]] = deque()
        self._backend = build_backend(
            backend,
            BackendOptions(self._reader, flatten(specs), batch_size, num_threads, prefetch, self._device),
        )

    @property
    def num_steps_per_epoch(self) -> int:
        """Whole global batches in one pass over the data; at least 1."""
        return max(1, self._order.num_samples // self._order.global_batch_size)

    def plan(self, step: int) -> BatchPlan:
        """This rank's plan of a step, undecodable samples that are known by now replaced."""
        ids, epochs = (values[self._rows] for values in self._order.ids(step))
        return plan_samples(self._shards, self._specs, self._seed, step, self._replace(ids, epochs), epochs)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self._submit_ahead()
        start = time.perf_counter()
        plan, views = self._collect()
        batch = to_batch(views, plan, self._device, self._dtype)
        labels = self._shards.index.label[plan.ids].astype(np.int64)
        self._wait_seconds += time.perf_counter() - start
        self._num_batches += 1
        self._submit_ahead()
        return Batch(
            plan.step,
            batch,
            torch.from_numpy(labels).to(self._device, non_blocking=True),
            torch.from_numpy(plan.ids).to(self._device, non_blocking=True),
        )

    def stats(self) -> dict[str, float]:
        """Totals since the start, this rank's: batches delivered, seconds that ``next`` waited, replaced samples, and
        the backend's seconds by stage (summed over its threads)."""
        return {
            "num_batches": self._num_batches,
            "wait_seconds": self._wait_seconds,
            "replaced_samples": len(self._undecodable),
            **self._backend.stats(),
        }

    def close(self) -> None:
        self._pending.clear()
        self._backend.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit_ahead(self) -> None:
        while len(self._pending) < self._prefetch:
            self._submit(self.plan(self._next_step))
            self._next_step += 1

    def _submit(self, plan: BatchPlan) -> None:
        self._reader.read_ahead(plan.ids)
        self._pending.append((plan, self._backend.submit(plan)))

    def _collect(self) -> tuple[BatchPlan, Views]:
        while True:
            plan, pending = self._pending[0]
            try:
                views = pending.result()
            except UndecodableError as error:
                self._report(error)
                self._rebuild()
            else:
                self._pending.popleft()
                return plan, views

    def _rebuild(self) -> None:
        """Plan and submit again what is pending: a failed batch may have taken its successors with it."""
        steps = [plan.step for plan, _ in self._pending]
        self._pending.clear()
        for step in steps:
            self._submit(self.plan(step))

    def _report(self, error: UndecodableError) -> None:
        self._undecodable |= error.reasons
        for sample, reason in error.reasons.items():
            log.warning("replaced %s: %s", self._reader.describe(sample), reason)
        if len(self._undecodable) > self._max_replaced:
            raise ValueError(
                f"more than max_replaced_samples = {self._max_replaced} samples cannot be decoded, the last one "
                f"{self._reader.describe(sample)}: {reason}; check the shards with "
                f"`python -m sharding.verify {self._shards.root} --decode`"
            )

    def _replace(self, ids: Ids, epochs: Ids) -> Ids:
        """Each undecodable id exchanged for one of its lane drawn by (seed, epoch, id, attempt)."""
        if not self._undecodable:
            return ids
        replaced = ids.copy()
        for row in np.flatnonzero(np.isin(ids, list(self._undecodable))):
            attempt = 0
            while int(replaced[row]) in self._undecodable:
                replaced[row] = self._draw_replacement(int(ids[row]), int(epochs[row]), attempt)
                attempt += 1
        return replaced

    def _draw_replacement(self, sample: int, epoch: int, attempt: int) -> int:
        words = philox(key_from_seed(self._seed), epoch, sample, _REPLACEMENT_STREAM, attempt)
        per_lane = self._order.samples_per_lane
        return sample // per_lane * per_lane + int(to_integer(words[..., 0], per_lane))


def plan_samples(shards: ShardSet, specs: Sequence[ViewSpec], seed: int, step: int, ids: Ids, epochs: Ids) -> BatchPlan:
    """`plan_batch` with the images' sizes looked up in the shards' index."""
    heights, widths = (sizes[ids].astype(np.int64) for sizes in (shards.index.height, shards.index.width))
    return plan_batch(specs, seed, step, ids, epochs, heights, widths)


def lane_shard_sizes(shards: ShardSet) -> tuple[tuple[int, ...], ...]:
    """Samples of each shard, by lane."""
    manifest = shards.manifest
    return tuple(
        tuple(shard.num_samples for shard in manifest.shards if shard.lane == lane)
        for lane in range(manifest.num_lanes)
    )
