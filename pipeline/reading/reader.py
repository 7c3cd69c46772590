"""Encoded images by sample id: random access to the shards, from a local disk or through a local cache.

Samples are read with `pread`, not from a memory map: the copy costs 4 us of a sample's 2 ms, and a file that is
truncated or a disk that fails under a running process is an OSError with a name instead of a SIGBUS.
"""

import os
import threading
import time

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.reading.cache import CacheOptions, ShardCache
from pipeline.stats import Stats
from pipeline.workers import Watch, Workers
from sharding.command import UserError
from sharding.manifest import ShardSet, repair_command

_MAX_OPEN_FILES = 256  # of the 1024 that many systems allow a process
_ADVICE_BYTES = 128 << 10  # Linux silently cuts longer advice to the device's read_ahead_kb, by default this


class Reader:
    """Reads the samples of an opened (and thereby checked) shard directory; safe to share between threads.

    Shards behind a URL need a ``cache``. ``watch`` knows of reads that do not return.
    """

    def __init__(self, shards: ShardSet, cache: CacheOptions | None = None, watch: Watch | None = None) -> None:
        if cache is None and not shards.directory.is_local:
            raise UserError(
                f"{shards.directory}: is not a local directory; name one to fetch its shards to: data.cache_dir of a "
                "run, --cache-dir of pipeline.preview"
            )
        self.shards, self.watch = shards, watch or Watch()
        self._cache = None if shards.directory.is_local or cache is None else ShardCache(shards, cache, self.watch)
        self._files: dict[int, _File] = {}
        self._advised: set[int] = set()
        self._lock = threading.Lock()
        self._seconds = 0.0
        # Advice about a cold disk takes 15 us a sample, too much for the thread that training waits for.
        self._adviser = Workers(1, "read-ahead", self.watch)

    def read(self, sample: int, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """The bytes of a sample, in memory of their own, or ``out``, which is as large as they are.

        Raises ValueError for bytes that are not those of the build: whether a decoder would notice depends on the
        decoder, and batches must not. Raises OSError, which names the shard, where the disk fails again and again.
        """
        start = time.perf_counter()
        index = self.shards.index
        shard, offset, size = int(index.shard[sample]), int(index.offset[sample]), int(index.size[sample])
        data = np.empty(size, np.uint8) if out is None else out
        file = self._file(shard)  # stays open, while it is referred to, whatever other threads do
        num_bytes = self.watch.insist(self._name(shard), lambda _: _fill(data, file.descriptor, offset))
        if num_bytes != size:
            raise OSError(
                f"{self.describe(sample)}: expected {size} bytes, found {num_bytes}: the shard was truncated while it "
                f"was read; {repair_command(self.shards.directory)} restores it"
            )
        sound = xxhash.xxh3_64_intdigest(data.data) == int(index.xxh3_64[sample])
        with self._lock:
            self._seconds += time.perf_counter() - start
        if not sound:
            raise ValueError("its bytes are not those that the shards were built with (checksum)")
        return data

    def read_ahead(self, samples: NDArray[np.int64]) -> None:
        """Have the operating system start reading these samples from a local disk; returns at once."""
        if not self._cache:
            self._adviser.submit(self._advise, samples)

    def fetch_ahead(self, shards: list[int]) -> None:
        """Start bringing these whole shards (rows of the manifest) nearer, the first first: from a URL to the cache,
        from a local disk to memory. To be called with all shards of the near future."""
        if self._cache:
            self._cache.fetch_ahead(shards)
            return
        for shard in shards:
            if shard not in self._advised:
                self._adviser.submit(self._advise_part, shard, 0, self.shards.manifest.shards[shard].num_bytes)
        self._advised = set(shards)

    def describe(self, sample: int) -> str:
        """Where a sample lies, for error messages."""
        index = self.shards.index
        path = self.shards.manifest.shards[int(index.shard[sample])].path
        return (
            f"sample {sample} ({path}, offset {int(index.offset[sample])}, source row {int(index.source_row[sample])})"
        )

    def stats(self) -> Stats:
        """Of reading, and of fetching shards."""
        reading = Stats(read_seconds=self._seconds)
        return reading + self._cache.stats() if self._cache else reading

    def close(self) -> None:
        self.watch.closing.set()
        if self._cache:
            self._cache.close()
        self._adviser.close()
        with self._lock:
            self._files = {}

    def _advise(self, samples: NDArray[np.int64]) -> None:
        index = self.shards.index
        for sample in samples.tolist():
            self._advise_part(int(index.shard[sample]), int(index.offset[sample]), int(index.size[sample]))

    def _advise_part(self, shard: int, offset: int, size: int) -> None:
        file, end = self._file(shard), offset + size
        for start in range(offset, end, _ADVICE_BYTES):
            with self.watch.watching(self._name(shard)):
                os.posix_fadvise(file.descriptor, start, min(_ADVICE_BYTES, end - start), os.POSIX_FADV_WILLNEED)

    def _file(self, shard: int) -> "_File":
        with self._lock:
            if shard in self._files:
                return self._files[shard]
        file = _File(self._open(shard))
        with self._lock:
            self._close_some()
            return self._files.setdefault(shard, file)

    def _close_some(self) -> None:
        """Make room for one more open file; those that were deleted from the cache take room on the disk."""
        if self._cache:
            self._files = {shard: file for shard, file in self._files.items() if not file.is_deleted}
        while len(self._files) >= _MAX_OPEN_FILES:
            del self._files[next(iter(self._files))]

    def _open(self, shard: int) -> int:
        if self._cache:
            return self._cache.open(shard)
        path = self.shards.root / self.shards.manifest.shards[shard].path
        return self.watch.insist(self._name(shard), lambda _: os.open(path, os.O_RDONLY))

    def _name(self, shard: int) -> str:
        return f"{self.shards.directory}/{self.shards.manifest.shards[shard].path}"


def _fill(data: NDArray[np.uint8], descriptor: int, offset: int) -> int:
    """Read on where a read ends early, to the end of ``data`` or of the file; returns how many bytes that is."""
    done = 0
    while done < len(data) and (more := os.preadv(descriptor, [data[done:].data], offset + done)):
        done += more
    return done


class _File:
    """An open file, closed with the last reference to it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @property
    def is_deleted(self) -> bool:
        return os.fstat(self.descriptor).st_nlink == 0

    def __del__(self) -> None:
        os.close(self.descriptor)
