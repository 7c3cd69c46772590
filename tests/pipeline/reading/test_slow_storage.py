"""Storage that is slow, fails now and then, or stops for a while: the run waits, says so, and sees the same batches."""

import logging
import os
import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from pipeline.loader import Batch, Loader
from pipeline.reading.cache import CacheOptions
from pipeline.views import ViewSpec
from sharding.manifest import ShardSet, open_shards
from tests.census import census, wait_until
from tests.pipeline.reading.faulty_s3 import Faults, s3_behind, serve

SPECS = [ViewSpec(size=16, kernel=3)]


def batches(shards: ShardSet, count: int, **settings: Any) -> list[Batch]:
    with Loader(shards, SPECS, seed=3, global_batch_size=8, window=1, **settings) as stream:
        return [next(stream) for _ in range(count)]


def same(first: list[Batch], second: list[Batch]) -> bool:
    return all(torch.equal(a.views[0], b.views[0]) for a, b in zip(first, second, strict=True))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Reads of shards return when it is set."""
    opened, preadv = threading.Event(), os.preadv

    def stalled(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        opened.wait()
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", stalled)
    return opened


class Opener(logging.Handler):
    """Opens a gate at the n-th warning."""

    def __init__(self, gate: threading.Event, num_warnings: int) -> None:
        super().__init__(logging.WARNING)
        self.gate, self.num_left, self.messages = gate, num_warnings, list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        self.num_left -= 1
        if not self.num_left:
            self.gate.set()


def test_a_disk_that_stops_for_a_while_is_waited_for_and_named(
    shard_set: ShardSet, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    opener = Opener(gate, num_warnings=2)
    monkeypatch.setattr(logging.getLogger("pipeline.loader"), "handlers", [opener])
    found = batches(shard_set, 2, num_threads=1, stall_seconds=4)
    assert same(found, batches(shard_set, 2))
    path = f"{shard_set.root}/lane-0"
    assert len(opener.messages) == 2
    for message in opener.messages:
        assert message.startswith("step 0: waiting for data for ")
        assert f"reads under way: 1, the first of {path}" in message


def test_a_disk_that_stops_for_good_is_an_error_that_was_announced(
    shard_set: ShardSet, gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    before = census()
    stream = Loader(shard_set, SPECS, seed=3, global_batch_size=8, num_threads=1, stall_seconds=0.5)
    with pytest.raises(OSError, match=r"lane-0.*tar: no answer for \d+ s; check the disk"):
        next(stream)
    assert caplog.messages
    assert all("waiting for data" in message for message in caplog.messages)
    gate.set()
    stream.close()
    wait_until(lambda: census() <= before)


@pytest.mark.usefixtures("s3")
def test_a_store_that_is_slow_refuses_and_cuts_short_gives_the_same_batches(
    shard_set: ShardSet, tmp_path: Path
) -> None:
    faults = Faults(latency_seconds=0.02, refuse_every=3, cut_every=4)
    fsspec.filesystem("s3").mkdir("faulty")
    fsspec.filesystem("s3").put(str(shard_set.root), "faulty/shards", recursive=True)
    with serve(faults) as url, s3_behind(url):
        remote = open_shards("s3://faulty/shards")
        room = CacheOptions(tmp_path, *2 * (sum(shard.num_bytes for shard in remote.manifest.shards),))
        found = batches(remote, 6, cache=room)
    assert faults.num_refused
    assert faults.num_cut
    assert same(found, batches(shard_set, 6))
