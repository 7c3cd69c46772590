"""Ways to run pure tasks: here, or on the processes of this machine. Results arrive in any order."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any, Protocol, TypeVar

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")


class Engine(Protocol):
    """Calls `task(shared, item)` for every item. The first exception of a task ends the iteration."""

    def __call__(self, task: Callable[[S, T], R], shared: S, items: Iterable[T], /) -> Iterator[R]: ...


def in_process(task: Callable[[S, T], R], shared: S, items: Iterable[T]) -> Iterator[R]:
    for item in items:
        yield task(shared, item)


def processes(num_workers: int) -> Engine:
    """Worker processes; `shared` is sent to each once. At most two items a worker are in flight."""

    def run(task: Callable[[S, T], R], shared: S, items: Iterable[T]) -> Iterator[R]:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["sharding.part"])
        queue = iter(items)
        with ProcessPoolExecutor(num_workers, context, _start_worker, (task, shared)) as pool:
            try:
                pending = {pool.submit(_call, item) for item in itertools.islice(queue, 2 * num_workers)}
                while pending:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    pending |= {pool.submit(_call, item) for item in itertools.islice(queue, len(done))}
                    yield from _results(done)
            finally:
                pool.shutdown(cancel_futures=True)

    return run


def _results(done: set[Future[R]]) -> Iterator[R]:
    for future in done:
        yield future.result()


_worker: tuple[Callable[[Any, Any], Any], Any] | None = None


def _start_worker(task: Callable[[Any, Any], Any], shared: Any) -> None:
    global _worker
    _worker = (task, shared)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which awaits what is in flight
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A killed parent would leave its workers waiting for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(item: Any) -> Any:
    assert _worker is not None
    task, shared = _worker
    return task(shared, item)
