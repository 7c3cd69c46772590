"""Threads that do work which may never return, such as reading from a network disk that died."""

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

STALL_SECONDS = 300.0  # without an answer; a disk that is only slow answers sooner
_NUM_ATTEMPTS = 8
_RETRY_SECONDS = 1.0  # before the second attempt, and twice as long before each further one: two minutes in all

T = TypeVar("T")
log = logging.getLogger(__name__)

_Jobs = SimpleQueue[tuple["Future[Any]", Callable[..., Any], tuple[Any, ...]] | None]


class Watch:
    """Knows which operations are under way, and since when; safe to share between threads.

    Once ``closing`` is set, none that failed is tried again.
    """

    def __init__(self, limit_seconds: float = STALL_SECONDS) -> None:
        self.limit_seconds, self.closing = limit_seconds, threading.Event()
        self._running: dict[object, tuple[str, float]] = {}

    @property
    def poll_seconds(self) -> float:
        """How often who waits for something should call `check`."""
        return min(1.0, self.limit_seconds)

    @contextlib.contextmanager
    def watching(self, what: str) -> Iterator[Callable[[], None]]:
        """The block reads ``what``, or is noticed by `check`. What it is given is called, by any thread, when there
        is progress: the time starts again."""
        key = object()
        self._running[key] = (what, time.monotonic())

        def progress() -> None:
            if key in self._running:
                self._running[key] = (what, time.monotonic())

        try:
            yield progress
        finally:
            del self._running[key]

    def insist(self, what: str, attempt: Callable[[Callable[[], None]], T]) -> T:
        """What ``attempt`` returns, which reads ``what`` and is given what `watching` gives.

        Tries again where it fails, for which each store has exceptions of its own. Raises OSError, which names
        ``what``, after the last attempt, and at once for a file that is not there or may not be read.
        """
        number = 0
        while True:
            number += 1
            try:
                with self.watching(what) as progress:
                    return attempt(progress)
            except Exception as error:
                is_final = number == _NUM_ATTEMPTS or isinstance(error, (FileNotFoundError, PermissionError))
                seconds = _RETRY_SECONDS * 2 ** (number - 1)
                if not is_final:
                    log.warning("%s: %s; trying again in %.0f s", what, error, seconds)
                if is_final or self.closing.wait(seconds):
                    raise OSError(f"{what}: cannot be read, attempt {number}: {error}") from error

    def check(self) -> None:
        """Raises OSError, which names what is read, if that had no answer for longer than the limit."""
        for what, start in list(self._running.values()):
            seconds = time.monotonic() - start
            if seconds > self.limit_seconds:
                raise OSError(f"{what}: no answer for {seconds:.0f} s; check the disk or the network, then start again")

    def describe(self) -> str:
        """How much is being read, and what was begun first."""
        running = [what for what, _ in list(self._running.values())]
        if not running:
            return "nothing is being read (the first run on a machine compiles its kernels)"
        return f"reads under way: {len(running)}, the first of {running[0]}"


class Workers:
    """A ThreadPoolExecutor whose threads do not keep a process from ending if one of them never returns.

    They start with the first job, and end with `close`, or when nothing refers to the pool. One thread at a time may
    submit.
    """

    def __init__(self, num_threads: int, name: str, watch: Watch) -> None:
        self._watch = watch
        self._jobs: _Jobs = SimpleQueue()
        self._names = [f"{name}_{i}" for i in range(num_threads)]
        self._threads: list[threading.Thread] = []
        self._end = weakref.finalize(self, _end, self._jobs, num_threads)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        if not self._end.alive:
            raise RuntimeError("the workers are closed")
        if not self._threads:
            self._start()
        future: Future[Any] = Future()
        self._jobs.put((future, function, arguments))
        return future

    def _start(self) -> None:
        self._threads = [
            threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True) for name in self._names
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Cancel what has not begun and wait for the rest. Raises OSError where that never returns."""
        self._end()
        for thread in self._threads:
            while thread.is_alive():
                thread.join(self._watch.poll_seconds)
                if thread.is_alive():
                    self._watch.check()


def _work(jobs: _Jobs) -> None:
    while job := jobs.get():
        future, function, arguments = job
        del job
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)
        del future, function, arguments  # what they hold is not to live until the next job


def _end(jobs: _Jobs, num_threads: int) -> None:
    with contextlib.suppress(Empty):
        while job := jobs.get_nowait():
            job[0].cancel()
            job[0].set_running_or_notify_cancel()  # without which `concurrent.futures.wait` would not return
    for _ in range(num_threads):
        jobs.put(None)
