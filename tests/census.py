"""What a test has left running."""

import multiprocessing
import threading
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

_python: Any = resource_tracker  # its process is started with the first worker and ends with the program


def census() -> tuple[set[str], set[int]]:
    """Threads and child processes that are alive now."""
    multiprocessing.active_children()  # reaps
    children = {int(pid) for task in Path("/proc/self/task").iterdir() for pid in _children(task)}
    threads = {f"{thread.name}, {thread.ident}" for thread in threading.enumerate()}
    return threads, children - {_python._resource_tracker._pid}


def _children(task: Path) -> list[str]:
    try:
        return (task / "children").read_text().split()
    except OSError:  # a thread that has just ended
        return []
