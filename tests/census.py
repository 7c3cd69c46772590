"""What a test has left running, and how tests wait."""

import multiprocessing
import threading
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

_python: Any = resource_tracker  # its process is started with the first worker and ends with the program


def wait_until(holds: Callable[[], object], patience: float = 120.0) -> None:
    """Wait for what happens by itself; ``patience`` (seconds) is for a hang, so it may be far more than is needed."""
    deadline = time.monotonic() + patience
    while not holds():
        assert time.monotonic() < deadline, f"waited {patience} seconds"
        time.sleep(0.005)


def census() -> set[str]:
    """Threads and child processes that are alive now.

    ``census() <= before``, not equality: what an earlier test has left may end in between. What others' libraries end
    in their own time is waited for: ``wait_until(lambda: census() <= before)``.
    """
    multiprocessing.active_children()  # reaps
    children = {int(pid) for task in Path("/proc/self/task").iterdir() for pid in _children(task)}
    threads = {f"thread {thread.name}, {thread.ident}" for thread in threading.enumerate()}
    return threads | {f"process {child}" for child in children - {_python._resource_tracker._pid}}


def _children(task: Path) -> list[str]:
    try:
        return (task / "children").read_text().split()
    except OSError:  # a thread that has just ended
        return []
