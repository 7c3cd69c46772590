"""Encoded images by sample id, from memory-mapped shards: random access without copies."""

import mmap
import os
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from sharding.manifest import ShardSet


class Reader:
    """Reads the samples of an opened (and thereby checked) shard directory; safe to share between threads."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards
        self._maps: dict[int, mmap.mmap] = {}

    def read(self, sample: int) -> NDArray[np.uint8]:
        """The JPEG bytes of a sample, as a read-only view of the page cache."""
        index = self.shards.index
        return np.frombuffer(
            self._map(int(index.shard[sample])), np.uint8, int(index.size[sample]), int(index.offset[sample])
        )

    def read_ahead(self, samples: Iterable[int]) -> None:
        """Ask the operating system to start reading these samples from disk, without waiting."""
        index = self.shards.index
        page = mmap.PAGESIZE
        for sample in samples:
            start = int(index.offset[sample]) // page * page
            length = int(index.offset[sample]) + int(index.size[sample]) - start
            self._map(int(index.shard[sample])).madvise(mmap.MADV_WILLNEED, start, length)

    def describe(self, sample: int) -> str:
        """Where a sample lies, for error messages: shard, key, offset."""
        index = self.shards.index
        path = self.shards.manifest.shards[int(index.shard[sample])].path
        return (
            f"sample {sample} ({path}, offset {int(index.offset[sample])}, source row {int(index.source_row[sample])})"
        )

    def _map(self, shard: int) -> mmap.mmap:
        if shard not in self._maps:
            path = self.shards.root / self.shards.manifest.shards[shard].path
            descriptor = os.open(path, os.O_RDONLY)
            try:
                # Two threads that map the same shard at once both get a valid mapping; one of them is dropped.
                self._maps[shard] = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
            finally:
                os.close(descriptor)
            self._maps[shard].madvise(mmap.MADV_RANDOM)
        return self._maps[shard]
