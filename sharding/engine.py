"""Ways to run pure tasks: here, or on this machine's processes. Results arrive in any order.

Tasks publish whole files only, so a worker may be killed at any moment.
"""

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")


class Engine(Protocol):
    """Calls ``task(shared, item)`` for every item. The first exception of a task ends the iteration."""

    def __call__(self, task: Callable[[S, T], R], shared: S, items: Iterable[T], /) -> Iterator[R]: ...


def in_process(task: Callable[[S, T], R], shared: S, items: Iterable[T]) -> Iterator[R]:
    for item in items:
        yield task(shared, item)


def processes(num_workers: int) -> Engine:
    """Worker processes (here, for one); ``shared`` is sent to each once, and at most two items a worker are in flight.

    Workers end when the caller does, however it ends: an exception, Ctrl-C, or kill -9.
    """
    if num_workers < 2:
        return in_process

    def run(task: Callable[[S, T], R], shared: S, items: Iterable[T]) -> Iterator[R]:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["datasets", "sharding.part"])
        start_forkserver()
        alive, ours = context.Pipe(duplex=False)
        queue = iter(items)
        with alive, ours, ProcessPoolExecutor(num_workers, context, _start, (task, shared, alive)) as pool:
            pending = {pool.submit(_call, item) for item in itertools.islice(queue, 2 * num_workers)}
            try:
                while pending:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    pending |= {pool.submit(_call, item) for item in itertools.islice(queue, len(done))}
                    yield from (future.result() for future in done)
            finally:
                if pending:
                    ours.close()  # an early end: workers exit at once

    return run


def start_forkserver() -> None:
    """With SIGINT blocked, which its children inherit, so that from their first instruction on Ctrl-C is left to the
    caller, which ends them."""
    resource_tracker.ensure_running()  # first, because it unblocks the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


_worker: tuple[Callable[[Any, Any], Any], Any] | None = None  # of this process, if it is a worker


def _start(task: Callable[[Any, Any], Any], shared: Any, caller: Connection) -> None:
    global _worker
    _worker = (task, shared)
    threading.Thread(target=_exit_with, args=(caller,), daemon=True).start()


def _exit_with(caller: Connection) -> None:
    """Nothing is ever sent: the pipe becomes readable when the caller closes its end or dies."""
    caller.poll(None)
    os._exit(1)


def _call(item: Any) -> Any:
    assert _worker is not None
    task, shared = _worker
    return task(shared, item)
