import ctypes
import errno
import mmap
import os
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.reading.reader import Reader
from sharding.manifest import ShardSet, open_shards
from tests.census import wait_until


def content(shards: ShardSet, sample: int) -> bytes:
    """A sample's bytes, cut out of the whole file."""
    index = shards.index
    data = (shards.root / shards.manifest.shards[int(index.shard[sample])].path).read_bytes()
    return data[int(index.offset[sample]) :][: int(index.size[sample])]


def test_reads_every_sample(shard_set: ShardSet) -> None:
    reader, seconds = Reader(shard_set), [0.0]
    for sample in range(len(shard_set.index)):
        data = reader.read(sample)
        seconds.append(reader.stats().read_seconds)
        assert data.tobytes() == content(shard_set, sample)
        assert data[:2].tobytes() == b"\xff\xd8"
    assert seconds == sorted(set(seconds)), "every read adds to the sum"
    reader.close()


def test_threads_share_a_reader_with_fewer_files_than_shards(
    shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.reading.reader._MAX_OPEN_FILES", 3)
    before = num_open_files()
    reader = Reader(shard_set)
    wrong: list[int] = []

    def work(seed: int) -> None:
        order = np.random.default_rng(seed).permutation(len(shard_set.index)).tolist()
        wrong.extend(i for i in order if reader.read(i).tobytes() != content(shard_set, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert num_open_files() <= before + 3
    reader.close()
    assert num_open_files() == before


def test_a_file_that_is_read_stays_open_whatever_is_evicted_meanwhile(
    shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.reading.reader._MAX_OPEN_FILES", 1)
    reader, preadv = Reader(shard_set), os.preadv

    def interrupted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        monkeypatch.setattr(os, "preadv", preadv)
        reader.read(len(shard_set.index) - 1)  # of another shard
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", interrupted)
    assert reader.read(0).tobytes() == content(shard_set, 0)
    reader.close()


def test_a_changed_byte_is_noticed(damage: Callable[[int], ShardSet]) -> None:
    reader = Reader(damage(7))
    with pytest.raises(ValueError, match="not those that the shards were built with"):
        reader.read(7)
    assert reader.read(8).tobytes() == content(reader.shards, 8)
    reader.close()


def test_a_shard_truncated_while_in_use_is_an_error_not_a_signal(copied_shards: Path) -> None:
    reader = Reader(open_shards(copied_shards))
    last = len(reader.shards.index) - 1
    reader.read(last)
    path = copied_shards / reader.shards.manifest.shards[-1].path
    os.truncate(path, 1000)
    with pytest.raises(OSError, match=rf"sample {last} \(lane-03/train-.*truncated while"):
        reader.read(last)
    reader.close()


class FailingDisk:
    """The next reads have these results: so many bytes at most, or an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *results: int | Exception) -> None:
        self.results, self._preadv = list(results), os.preadv
        monkeypatch.setattr(os, "preadv", self)
        monkeypatch.setattr("pipeline.workers._RETRY_SECONDS", 0.001)

    def __call__(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        result = self.results.pop(0) if self.results else 10**9
        if isinstance(result, Exception):
            raise result
        return self._preadv(descriptor, [buffers[0][:result]], offset)


def error() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_read_that_fails_or_ends_early_is_tried_again(
    shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk, reader = FailingDisk(monkeypatch, error(), 10, error(), 20, 30), Reader(shard_set)
    assert reader.read(0).tobytes() == content(shard_set, 0)
    assert not disk.results
    assert len(caplog.messages) == 2
    for line in caplog.messages:
        assert re.search(r"lane-00/train-000000\.tar: .* Input/output error; trying again in", line)
    reader.close()


def test_a_read_that_always_fails_is_an_error_by_name(shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, reader = FailingDisk(monkeypatch, *(error() for _ in range(9))), Reader(shard_set)
    with pytest.raises(OSError, match=r"lane-00/train-000000\.tar: cannot be read, attempt 8: .* Input/output error"):
        reader.read(0)
    assert len(disk.results) == 1
    reader.close()


def test_read_ahead_brings_samples_and_whole_shards_into_memory(shard_set: ShardSet) -> None:
    shards = shard_set.manifest.shards
    paths = [shard_set.root / shard.path for shard in shards]
    drop(paths)
    if any(cached_fraction(path) > 0.5 for path in paths):
        pytest.skip("this file system does not let go of cached pages")
    reader = Reader(shard_set)
    reader.read_ahead(np.flatnonzero(shard_set.index.shard == 0))
    reader.fetch_ahead([1])
    wait_until(lambda: min(cached_fraction(paths[0]), cached_fraction(paths[1])) >= 0.7)  # the rest is padding
    assert cached_fraction(paths[-1]) < 0.5
    reader.close()


def test_all_of_a_large_shard_is_read_ahead(copied_shards: Path) -> None:
    """Linux cuts one piece of advice short: to 8 MB here, to 128 kB in its default settings."""
    path, shards = copied_shards / "lane-00" / "large.tar", open_shards(copied_shards)
    path.write_bytes(bytes(24 << 20))
    large = replace(shards.manifest.shards[0], path="lane-00/large.tar", num_bytes=24 << 20)
    drop([path])
    if cached_fraction(path) > 0.5:
        pytest.skip("this file system does not let go of cached pages")
    reader = Reader(replace(shards, manifest=replace(shards.manifest, shards=(large,))))
    reader.fetch_ahead([0])
    wait_until(lambda: cached_fraction(path) >= 0.99)
    reader.close()


def test_describes_where_a_sample_lies(shard_set: ShardSet) -> None:
    sample = int(np.flatnonzero(shard_set.index.shard == 1)[0])
    assert Reader(shard_set).describe(sample).startswith(f"sample {sample} (lane-00/train-000001.tar, offset 512, ")


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def drop(paths: list[Path]) -> None:
    """Out of the page cache."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_fraction(path: Path) -> float:
    """Of the file's pages, how many are in memory."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        resident = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
        address = np.frombuffer(mapped, np.uint8).ctypes.data
        ctypes.CDLL(None).mincore(
            ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), ctypes.c_void_p(resident.ctypes.data)
        )
    return float((resident & 1).mean())
