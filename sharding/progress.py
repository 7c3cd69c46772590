"""Progress on the standard error stream: of a build, in images and bytes of the source, and of any other steps."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


def steps(of: Iterable[T], what: str, total: int | None = None, *, shown: bool = True) -> Iterable[T]:
    """The same, with a bar while a terminal is looking, of which nothing is left."""
    console = Console(stderr=True)
    hidden = not (shown and console.is_terminal)
    return rich.progress.track(of, what, total=total, console=console, transient=True, disable=hidden)


def bar() -> Progress:
    what, speed = TextColumn("{task.description}"), TextColumn("{task.fields[speed]}")
    return Progress(what, BarColumn(), MofNCompleteColumn(), speed, TimeRemainingColumn(), console=Console(stderr=True))


def track(
    results: Iterator[T],
    progress: Progress | None,
    what: str,
    *,
    size: Callable[[T], tuple[int, int]],
    total: int | None = None,
    done: int = 0,
) -> Iterator[T]:
    """Pass results on, showing images done of ``total`` and the speed of this run; ``size`` gives (images, bytes)."""
    if progress is None:
        yield from results
        return
    start, images, num_bytes = time.perf_counter(), 0, 0
    task = progress.add_task(what, total=total, completed=done, speed="")
    for result in results:
        more_images, more_bytes = size(result)
        images, num_bytes = images + more_images, num_bytes + more_bytes
        seconds = time.perf_counter() - start
        speed = f"{images / seconds:.0f} images/s, {num_bytes / 1e6 / seconds:.0f} MB/s"
        progress.update(task, completed=done + images, speed=speed)
        yield result
