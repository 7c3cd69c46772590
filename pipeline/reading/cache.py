"""Shards of an object store, whole, in a local directory of bounded size that the processes of a node share.

A shard lies there under its checksum, so a run finds what earlier ones fetched. Whoever needs room deletes the shards
that were opened longest ago; a process that is reading one of them keeps its open file.
"""

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from fsspec.callbacks import Callback

from pipeline.stats import Stats
from pipeline.workers import Watch, Workers
from sharding.command import UserError
from sharding.manifest import Shard, ShardSet
from sharding.storage import checksum, locked

_NUM_FETCHERS = 4  # shards at a time: one stream of an object store is far slower than the network


@dataclass(frozen=True)
class CacheOptions:
    directory: Path
    max_bytes: int  # of all shards in the directory
    ahead_bytes: int  # of the shards that this process may want there at a time: its share


class ShardCache:
    """Local copies of the shards of ``shards``; safe to share between threads.

    Raises ValueError when not even the largest shard fits.
    """

    def __init__(self, shards: ShardSet, options: CacheOptions, watch: Watch) -> None:
        largest = max(shards.manifest.shards, key=lambda shard: shard.num_bytes)
        if options.max_bytes < largest.num_bytes:
            raise UserError(
                f"cache of {options.max_bytes} bytes: expected room for the largest shard, {largest.path} of "
                f"{largest.num_bytes} bytes; raise data.cache_bytes"
            )
        options.directory.mkdir(parents=True, exist_ok=True)
        self._source, self._shards, self._options = shards.directory, shards.manifest.shards, options
        self._sizes = {shard.xxh3_128: shard.num_bytes for shard in self._shards}
        self._fetching: dict[int, Future[None]] = {}
        self._lock = threading.Lock()
        self._fetched_bytes, self._fetch_seconds = 0, 0.0
        self._watch = watch
        self._pool = Workers(_NUM_FETCHERS, "shard-cache", watch)

    def open(self, number: int) -> int:
        """Descriptor of the local copy of shard ``number``, fetched if need be. Raises OSError where that fails."""
        path = self._path(self._shards[number])
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                self._fetch(number).result()
            else:
                os.utime(descriptor)
                return descriptor

    def fetch_ahead(self, numbers: Iterable[int]) -> None:
        """Start fetching those of these shards that are not here, the first first."""
        for number in numbers:
            if not self._path(self._shards[number]).exists():
                self._fetch(number)

    def stats(self) -> Stats:
        """Of fetching."""
        return Stats(fetch_seconds=self._fetch_seconds, fetched_bytes=self._fetched_bytes)

    def close(self) -> None:
        self._pool.close()

    def _path(self, shard: Shard) -> Path:
        return self._options.directory / f"{shard.xxh3_128}.tar"

    def _fetch(self, number: int) -> "Future[None]":
        with self._lock:
            future = self._fetching.get(number)
            if future is None or future.done():
                future = self._fetching[number] = self._pool.submit(self._download, self._shards[number])
            return future

    def _download(self, shard: Shard) -> None:
        start, path = time.perf_counter(), self._path(shard)
        with _alone(path.with_suffix(".part")) as part:
            if path.exists():  # another process was faster
                return
            self._make_room()
            self._copy(shard, part)
            self._check(part, shard)
            with self._directory_lock():
                part.replace(path)
        with self._lock:
            self._fetched_bytes += shard.num_bytes
            self._fetch_seconds += time.perf_counter() - start

    def _copy(self, shard: Shard, part: Path) -> None:
        def attempt(progress: Callable[[], None]) -> None:
            # Called in any thread; by s3fs not before ten ranges of 50 MB each are there, which may be all of a shard.
            blocks = Callback(hooks={"progress": lambda *_, **__: progress()})
            fs = self._source.fs
            stream = {"block_size": 0} if fs.protocol == "hf" else {}  # not 5 MB a request, which the hub counts
            fs.get_file(self._source.path(shard.path), str(part), callback=blocks, **stream)

        self._watch.insist(f"{self._source}/{shard.path}", attempt)

    def _check(self, part: Path, shard: Shard) -> None:
        with part.open("rb") as file:
            found = part.stat().st_size, checksum(file)
        if found != (shard.num_bytes, shard.xxh3_128):
            raise OSError(
                f"{self._source}/{shard.path}: expected {shard.num_bytes} bytes with checksum {shard.xxh3_128}, "
                f"received {found[0]} with {found[1]}; check the source with "
                f"`python -m sharding.verify {self._source}`"
            )

    def _make_room(self) -> None:
        """Delete what was opened longest ago until the rest fits, files that are being fetched at their full size.

        Those stay, whoever fetches them; what a killed process left goes.
        """
        with self._directory_lock():
            files = sorted(self._files())
            total = sum(num_bytes for _, num_bytes, _ in files)
            for _, num_bytes, path in files:
                if total <= self._options.max_bytes:
                    break
                if not _is_being_written(path):
                    path.unlink(missing_ok=True)
                    total -= num_bytes

    def _directory_lock(self) -> AbstractContextManager:
        """Nothing is renamed or deleted meanwhile: a file seen under both its names would be counted twice."""
        return locked(self._options.directory / ".lock")

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """When each file was last opened or written, its bytes, its path."""
        for path in self._options.directory.iterdir():
            if path.suffix in (".tar", ".part"):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    yield status.st_mtime, self._sizes.get(path.stem, status.st_size), path


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """A file that one process at a time writes; it is gone at the end, unless renamed. Killed, it can be taken over."""
    while True:
        with locked(path) as file:
            if not _is_open(path, file.fileno()):
                continue  # renamed or deleted while this process waited
            try:
                yield path
            finally:
                path.unlink(missing_ok=True)
            return


def _is_being_written(path: Path) -> bool:
    """Whether some process holds it by `_alone`."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _is_open(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
