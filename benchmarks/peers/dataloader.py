"""An iterator as a peer, and `torch.utils.data.DataLoader` as an iterator."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks.peers import Peer, PeerOptions

_ENDLESS = 10**12  # samples


def batches_of(batches: Iterator[Any], stack: ExitStack) -> Peer:
    """Of an iterator over (list of views, labels) that ends what it has started when nothing refers to it."""
    held = [batches]
    stack.callback(held.clear)
    return lambda: len(next(held[0])[0][0])


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
