import os
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path

import pytest

from pipeline.workers import Watch, Workers
from tests.census import census, wait_until


def stalled_read(path: Path) -> Callable[[], None]:
    """Makes ``path`` a file of which no read returns, until the function that this returns is called."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)

    def release() -> None:
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))

    return release


def until_running(future: Future) -> None:
    wait_until(future.running)


def test_results_errors_and_what_never_began() -> None:
    before, gate = census(), threading.Event()
    workers = Workers(1, "test", Watch())
    assert census() <= before, "no thread before there is work"
    assert workers.submit(max, 1, 2).result() == 2
    with pytest.raises(ZeroDivisionError):
        workers.submit(divmod, 1, 0).result()
    running, waiting = workers.submit(gate.wait), workers.submit(max, 1, 2)
    until_running(running)
    threading.Timer(0.01, gate.set).start()
    workers.close()
    assert wait([running, waiting]).not_done == set()
    assert running.result()
    with pytest.raises(CancelledError):
        waiting.result()
    with pytest.raises(RuntimeError, match="closed"):
        workers.submit(max, 1, 2)


def test_threads_end_when_the_pool_is_dropped() -> None:
    workers = Workers(2, "test", Watch())
    workers.submit(max, 1, 2).result()
    threads = workers._threads
    del workers
    for thread in threads:
        thread.join()


def test_close_names_a_read_that_never_returns(tmp_path: Path) -> None:
    watch = Watch(0.05)
    release = stalled_read(tmp_path / "shard.tar")
    workers = Workers(1, "test", watch)

    def read() -> None:
        with watch.watching("shard.tar"):
            (tmp_path / "shard.tar").read_bytes()

    reading = workers.submit(read)
    until_running(reading)
    with pytest.raises(OSError, match=r"shard.tar: no answer for \d+ s; check the disk"):
        workers.close()
    assert not reading.done()
    release()
    reading.result()
    workers.close()


def test_progress_starts_the_time_again_whichever_thread_tells_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("pipeline.workers.time.monotonic", lambda: now)
    watch = Watch(10)
    with watch.watching("shard.tar") as progress:
        now = 11.0
        thread = threading.Thread(target=progress)
        thread.start()
        thread.join()
        watch.check()
        now = 22.0
        with pytest.raises(OSError, match=r"shard.tar: no answer for 11 s"):
            watch.check()
    progress()  # too late to matter
    now = 100.0
    watch.check()
