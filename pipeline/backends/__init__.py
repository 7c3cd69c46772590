"""Executors of a batch plan, one file each: read bytes, decode once, cut and resize the views, photometric operations.

A backend turns a `BatchPlan` into uint8 views and draws no random numbers. Normalising, casting and copying to the
device are the same for all of them (`pipeline.transfer`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Protocol

import torch

from pipeline.plan import BatchPlan
from pipeline.reading.reader import Reader
from pipeline.stats import Stats
from sharding.command import UserError

# V tensors (n, size, size, 3) uint8, RGB, contiguous, in the order of `plan.views`
Views = list[torch.Tensor]


class DamagedSampleError(UserError):
    """Samples of a batch that have a wrong checksum or cannot be decoded; ``reasons`` says which, by id."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__("; ".join(f"sample {i}: {reason}" for i, reason in reasons.items()))
        self.reasons = reasons


class Pending(Protocol):
    """A batch in the making."""

    def done(self) -> bool:
        """Whether `result` would return at once, as far as the host knows."""
        ...

    def result(self, timeout: float | None = None) -> Views:
        """Wait for the views. Raises `DamagedSampleError`, naming all such samples of the batch, and TimeoutError where
        something is missing after ``timeout`` seconds."""
        ...


class Backend(Protocol):
    """Makes batches from plans.

    Pending batches are collected in the order in which they were submitted. After an `DamagedSampleError` those still
    pending are void: the loader submits them again, with other samples where needed.
    """

    def submit(self, plan: BatchPlan) -> Pending:
        """Start on a batch and return at once. The loader keeps a few batches pending."""
        ...

    def stats(self) -> Stats:
        """Seconds spent so far on decoding and on the views, as far as they are measured."""
        ...

    def close(self) -> None:
        """Stop; leaves no thread or process behind. A closed backend takes no more plans. Raises OSError where that
        never ends, because a read does not return."""
        ...


@dataclass(frozen=True)
class BackendContext:
    """Where a backend runs, and what it is built from."""

    reader: Reader
    batch_size: int  # of this rank, at most
    num_threads: int
    device: torch.device
    canary_every: int = 0  # steps between comparisons with `cpu`, of "auto"; 0: only one before the first


# name -> "module:builder", imported when chosen; a builder takes BackendContext and returns a Backend
BACKENDS = {
    "cpu": "pipeline.backends.cpu:build",
    "dali": "pipeline.backends.dali.backend:build",
    "torchvision": "pipeline.backends.torchvision:build",
    "synthetic": "pipeline.backends.synthetic:build",
}


def build_backend(name: str, context: BackendContext) -> Backend:
    """``auto`` is `pipeline.canary.build`. Raises ValueError for an unknown name, and ImportError naming the extra of
    an optional one not installed."""
    builders = {**BACKENDS, "auto": "pipeline.canary:build"}
    if name not in builders:
        raise UserError(f"backend: expected one of {', '.join(BACKENDS)}, found {name!r}")
    build: Callable[[BackendContext], Backend] = resolve_name(builders[name])
    return build(context)
