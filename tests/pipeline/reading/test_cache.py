import contextlib
import fcntl
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from fsspec.callbacks import Callback
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.loader import Batch, Loader
from pipeline.order import Order, Sequential, ShuffledPart
from pipeline.reading.cache import CacheOptions
from pipeline.reading.reader import Reader
from pipeline.views import ViewSpec
from pipeline.workers import Watch
from sharding.manifest import ShardSet, open_shards
from tests.census import census, wait_until


def shard_bytes(shards: ShardSet) -> list[int]:
    return [shard.num_bytes for shard in shards.manifest.shards]


def options(directory: Path, max_bytes: int) -> CacheOptions:
    return CacheOptions(directory, max_bytes, max_bytes)


def size_of(directory: Path) -> int:
    """While nothing is deleted; a file may be renamed meanwhile."""
    sizes: dict[str, int] = {}
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                sizes[path.stem] = path.stat().st_size
    return sum(sizes.values())


def batches(shards: ShardSet, count: int, **settings: Any) -> list[Batch]:
    with loader(shards, **settings) as stream:
        return [next(stream) for _ in range(count)]


def loader(shards: ShardSet, **settings: Any) -> Loader:
    return Loader(shards, [ViewSpec(size=16, kernel=3)], seed=3, global_batch_size=8, **settings)


def same(first: list[Batch], second: list[Batch]) -> bool:
    return all(torch.equal(a.views[0], b.views[0]) for a, b in zip(first, second, strict=True))


def test_a_cache_smaller_than_the_data_gives_the_same_batches(
    shard_set: ShardSet, remote: ShardSet, tmp_path: Path
) -> None:
    before, total = census(), sum(shard_bytes(remote))
    expected = batches(shard_set, 30, window=1)
    with loader(remote, window=1, cache=options(tmp_path, 3 * total // 4)) as stream:
        found = []
        for _ in range(30):
            found.append(next(stream))
            assert size_of(tmp_path) <= 3 * total // 4
        assert stream.stats().fetched_bytes > 1.2 * total  # 2.6 passes: some were fetched again
    assert same(found, expected)
    assert census() <= before


def test_a_full_permutation_needs_room_for_all_and_fetches_once(
    shard_set: ShardSet, remote: ShardSet, tmp_path: Path
) -> None:
    total = sum(shard_bytes(remote))
    with loader(remote, cache=options(tmp_path, total)) as stream:
        found = [next(stream) for _ in range(30)]
        assert stream.stats().fetched_bytes == total
        assert stream.stats().fetch_seconds > 0
    assert same(found, batches(shard_set, 30))
    with loader(remote, cache=options(tmp_path, total)) as again:
        next(again)
        assert again.stats().fetched_bytes == 0
    with pytest.raises(ValueError, match=rf"shuffles among {total} bytes .*keep {total - 1} .*none: all"):
        loader(remote, cache=options(tmp_path, total - 1))


def test_the_next_shards_are_fetched_before_they_are_read(remote: ShardSet, tmp_path: Path) -> None:
    with loader(remote, window=1, rank=0, world_size=4, cache=options(tmp_path, sum(shard_bytes(remote)))) as stream:
        next(stream)
        of_this_lane = sum(shard.num_bytes for shard in remote.manifest.shards if shard.lane == 0)
        wait_until(lambda: stream.stats().fetched_bytes == of_this_lane)


@pytest.mark.parametrize("order", [Sequential(np.arange(92), 8), ShuffledPart(np.arange(0, 92, 2), 0, 8)])
def test_every_order_is_fetched_ahead_and_no_shard_twice(remote: ShardSet, tmp_path: Path, order: Order) -> None:
    total = sum(shard_bytes(remote))
    with loader(remote, order=order, prefetch=1, cache=CacheOptions(tmp_path, total, total)) as stream:
        next(stream)
        wait_until(lambda: stream.stats().fetched_bytes == total)
        assert len([*islice(stream, 11)]) == 11
        assert stream.stats().fetched_bytes == total


def test_a_part_needs_room_for_all_of_it_once_on_a_node(remote: ShardSet, tmp_path: Path) -> None:
    order = ShuffledPart(np.flatnonzero(remote.index.shard < 2), 0, 8)
    room = sum(shard_bytes(remote)[:2])
    loader(remote, order=order, cache=CacheOptions(tmp_path, room, room // 8)).close()
    with pytest.raises(ValueError, match=rf"shuffles among {room} bytes .*keep {room - 1} of them; .*cache_bytes$"):
        loader(remote, order=order, cache=CacheOptions(tmp_path, room - 1, room - 1))


def test_least_recently_opened_shards_make_room(remote: ShardSet, tmp_path: Path) -> None:
    sizes = shard_bytes(remote)
    reader = Reader(remote, options(tmp_path, sum(sizes[:3])))
    for number in (0, 1, 2, 0, 3):
        reader.read(int((remote.index.shard < number).sum()))
        time.sleep(0.02)
    assert shards_in(tmp_path, remote) == {1, 2, 3}
    assert not [path for path in open_files() if path.startswith(str(tmp_path)) and path.endswith("(deleted)")]
    other = Reader(remote, options(tmp_path, sum(sizes[:3])))
    other.read(int((remote.index.shard < 1).sum()))
    reader.read(0)
    assert shards_in(tmp_path, remote) == {0, 1, 3}, "2 makes room: 1 was opened by another process since"
    for opened in (reader, other):
        opened.close()


def shards_in(directory: Path, shards: ShardSet) -> set[int]:
    numbers = {shard.xxh3_128: number for number, shard in enumerate(shards.manifest.shards)}
    return {numbers[path.stem] for path in directory.glob("*.tar")}


def open_files() -> list[str]:
    links = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(str(link.readlink()))
    return links


def test_a_shard_that_another_process_fetches_is_waited_for(
    remote: ShardSet, shard_set: ShardSet, tmp_path: Path
) -> None:
    shard, before = remote.manifest.shards[0], census()
    part = tmp_path / f"{shard.xxh3_128}.part"
    reader = Reader(remote, options(tmp_path, 10**9))
    thread = threading.Thread(target=reader.read, args=(0,))
    with part.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        file.write((shard_set.root / shard.path).read_bytes())
        part.replace(part.with_suffix(".tar"))
    thread.join()
    assert reader.stats().fetched_bytes == 0
    reader.close()
    assert census() <= before


def test_close_waits_for_what_is_being_fetched(remote: ShardSet, tmp_path: Path) -> None:
    before = census()
    reader = Reader(remote, options(tmp_path, 10**9))
    reader.fetch_ahead(list(range(12)))
    reader.close()
    assert census() <= before
    assert not list(tmp_path.glob("*.part"))


def test_processes_that_want_the_same_shard_fetch_it_once(remote: ShardSet, tmp_path: Path) -> None:
    readers = [Reader(remote, options(tmp_path, 10**9)) for _ in range(4)]
    threads = [threading.Thread(target=reader.read, args=(0,)) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(reader.stats().fetched_bytes for reader in readers) == shard_bytes(remote)[0]
    assert not list(tmp_path.glob("*.part"))
    for reader in readers:
        reader.close()


def test_what_a_killed_process_left_is_written_again(remote: ShardSet, tmp_path: Path, shard_set: ShardSet) -> None:
    (tmp_path / f"{remote.manifest.shards[0].xxh3_128}.part").write_bytes(b"half of a shard")
    reader = Reader(remote, options(tmp_path, 10**9))
    assert reader.read(0).tobytes() == Reader(shard_set).read(0).tobytes()
    reader.close()
    assert not list(tmp_path.glob("*.part"))


def test_room_is_made_of_what_a_killed_process_left_but_not_of_what_another_fetches(
    remote: ShardSet, tmp_path: Path
) -> None:
    left, fetched = (tmp_path / f"{shard.xxh3_128}.part" for shard in remote.manifest.shards[:2])
    left.write_bytes(b"half of a shard")
    with fetched.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        reader = Reader(remote, options(tmp_path, sum(shard_bytes(remote)[1:3])))
        reader.read(int((remote.index.shard < 2).sum()))
        reader.close()
        assert fetched.exists()
        assert not left.exists()


@pytest.mark.parametrize("harm", ["flipped", "cut", "gone"])
def test_what_does_not_arrive_as_it_was_built_is_refused_by_name(remote: ShardSet, tmp_path: Path, harm: str) -> None:
    memory, path = fsspec.filesystem("memory"), f"/data/shards/{remote.manifest.shards[0].path}"
    data = bytearray(memory.cat_file(path))
    if harm == "gone":
        memory.rm(path)
    else:
        data[3000] ^= 1
        memory.pipe_file(path, bytes(data[: -512 if harm == "cut" else None]))
    with pytest.raises(OSError, match=r"^memory://data/shards/lane-00/train-000000.tar: "):
        batches(remote, 12, window=1, cache=options(tmp_path, 10**9))
    assert not list(tmp_path.glob("*.part"))
    assert not (tmp_path / f"{remote.manifest.shards[0].xxh3_128}.tar").exists()


class Flaky(MemoryFileSystem):
    """fsspec's memory behind a bad network: the next ``failures`` transfers fail, the others wait for ``gate``."""

    protocol = "flaky"
    failures = 0
    gate = threading.Event()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("flaky://", "memory://")))

    def get_file(self, *arguments: Any, **options: Any) -> None:
        if Flaky.failures:
            Flaky.failures -= 1
            raise ConnectionError("reset by peer")
        Flaky.gate.wait()
        super().get_file(*arguments, **options)


@pytest.fixture
def flaky(remote: ShardSet, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardSet]:
    monkeypatch.setattr("pipeline.workers._RETRY_SECONDS", 0.001)
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.gate.set()
    yield open_shards(remote.directory.url.replace("memory", "flaky"))
    Flaky.failures = 0


def test_a_transfer_that_fails_is_tried_again(
    flaky: ShardSet, shard_set: ShardSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reader = Reader(flaky, options(tmp_path, 10**9))
    Flaky.failures = 2
    assert reader.read(0).tobytes() == Reader(shard_set).read(0).tobytes()
    reader.close()
    assert len(caplog.messages) == 2
    assert all("lane-00/train-000000.tar: reset by peer; trying again in" in line for line in caplog.messages)


def test_a_transfer_that_always_fails_is_an_error_by_name(flaky: ShardSet, tmp_path: Path) -> None:
    reader = Reader(flaky, options(tmp_path, 10**9))
    Flaky.failures = 10**6
    with pytest.raises(OSError, match=r"^flaky://data/shards/lane-00/train-000000.tar: .* attempt 8: reset by peer"):
        reader.read(0)
    reader.close()


def test_close_does_not_wait_for_further_attempts(
    flaky: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = census()
    monkeypatch.setattr("pipeline.workers._RETRY_SECONDS", 1e6)
    Flaky.failures = 10**6
    stream = loader(flaky, cache=options(tmp_path, 10**9))
    stream._submit_ahead()
    wait_until(lambda: caplog.messages)
    stream.close()
    assert census() <= before


def test_a_slow_transfer_is_no_stall(flaky: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block that arrives is progress: without an end, but never without an answer."""
    told: list[float] = []
    watch = Watch()

    def get_file(_: Flaky, path: str, target: str, callback: Callback) -> None:
        for size in (1, 2):
            told.append(max(since for _, since in watch._running.values()))
            callback.relative_update(size)
        told.append(max(since for _, since in watch._running.values()))
        MemoryFileSystem().get_file(path, target)

    monkeypatch.setattr(Flaky, "get_file", get_file)
    reader = Reader(flaky, options(tmp_path, 10**9), watch)
    reader.read(0)
    reader.close()
    assert told == sorted(set(told))


def test_a_transfer_that_never_ends_is_an_error_by_name(flaky: ShardSet, tmp_path: Path) -> None:
    before = census()
    Flaky.gate.clear()
    stream = loader(flaky, window=1, cache=options(tmp_path, 10**9), stall_seconds=0.1)
    for moment in (stream.__next__, stream.close):
        with pytest.raises(OSError, match=r"^flaky://data/shards/lane-0.*tar: no answer for \d+ s"):
            moment()
    Flaky.gate.set()
    wait_until(lambda: census() <= before)


def test_impossible_caches_are_refused(remote: ShardSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"memory://data/shards: is not a local directory; name one .* data.cache_dir"):
        loader(remote)
    with pytest.raises(ValueError, match=r"cache of 1000 bytes: expected room for the largest shard, lane-"):
        Reader(remote, options(tmp_path, 1000))
    with pytest.raises(ValueError, match=r"raise data.cache_bytes, or lower data.window \(now 2\)"):
        loader(remote, window=2, cache=options(tmp_path, max(shard_bytes(remote)) * 4))


def test_local_shards_need_no_cache_and_use_none(shard_set: ShardSet, tmp_path: Path) -> None:
    assert len(batches(shard_set, 2, window=1, cache=options(tmp_path / "cache", 10))) == 2
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("s3")
def test_worker_processes_read_shards_on_s3_through_the_cache(shard_set: ShardSet, tmp_path: Path) -> None:
    fsspec.filesystem("s3").mkdir("loader")
    fsspec.filesystem("s3").put(str(shard_set.root), "loader/shards", recursive=True)
    remote = open_shards("s3://loader/shards")
    settings = {"window": 1, "cache": options(tmp_path, sum(shard_bytes(remote)))}
    found = batches(remote, 4, backend="torchvision", num_threads=1, **settings)
    for batch, expected in zip(found, batches(shard_set, 4, window=1), strict=True):
        torch.testing.assert_close(batch.views[0], expected.views[0], rtol=0, atol=0.04)  # another backend
