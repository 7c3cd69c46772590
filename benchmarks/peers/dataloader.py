"""An iterator as a peer, and `torch.utils.data.DataLoader` as an iterator."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks.peers import PeerOptions

_ENDLESS = 10**12  # samples


class IteratorPeer:
    """``batches`` yields (list of views, labels), and ends what it has started when it is no longer referred to."""

    def __init__(
        self, batches: Iterator[Any], num_ahead: int, directory: "TemporaryDirectory[str] | None" = None
    ) -> None:
        self.num_ahead = num_ahead
        self._batches, self._directory = batches, directory

    def next_batch(self) -> int:
        views, _ = next(self._batches)
        return len(views[0])

    def close(self) -> None:
        del self._batches  # the last reference: ends its threads or worker processes
        if self._directory:
            self._directory.cleanup()


def over(dataset: Dataset, options: PeerOptions) -> Iterator[Any]:
    """Endless shuffled batches of a map-style data set."""
    return iter(
        DataLoader(
            dataset,
            options.batch_size,
            sampler=RandomSampler(range(len(dataset)), replacement=True, num_samples=_ENDLESS),  # type: ignore[arg-type]
            drop_last=True,
            **worker_options(options),
        )
    )


def worker_options(options: PeerOptions) -> dict[str, Any]:
    return {
        "num_workers": options.num_threads,
        "prefetch_factor": options.prefetch,
        "pin_memory": torch.cuda.is_available(),
        "persistent_workers": True,
    }


def temporary_directory(options: PeerOptions) -> "TemporaryDirectory[str]":
    """Beside the shards, so that all contestants read from the same disk; elsewhere if that is not allowed."""
    root = options.shards.root.parent
    try:
        return TemporaryDirectory(prefix="peer-", dir=root)
    except PermissionError:
        return TemporaryDirectory(prefix="peer-")


def name_of(directory: "TemporaryDirectory[str]") -> Path:
    return Path(directory.name)
