"""The training loop: the only one. What is trained is a task, what happens between steps are hooks."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.loader import Batch
from train.methods import Loss


@dataclass(frozen=True)
class StepDone:
    """What hooks are told after an update."""

    done: int  # updates of the run so far
    last: bool  # whether the run ends here, finished or stopped
    batch: Batch  # that the step was made with, of this rank
    loss: Loss  # of this step and rank, on the device


Task = Callable[[Batch, int], Loss]  # updates with the batch of a step, of consecutive ones; waits for nothing
Hook = Callable[[StepDone], None]  # called after every update, in order; on all ranks if it communicates
Stop = Callable[[], bool]  # whether to end after this update: the same answer on all ranks


class Clock:
    """Time that is not training: hooks that stand in its way run within `pausing`."""

    def __init__(self) -> None:
        self.pause_seconds = 0.0

    @contextmanager
    def pausing(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.pause_seconds += time.perf_counter() - start


def fit(
    task: Task, batches: Iterator[Batch], total_steps: int, hooks: Sequence[Hook], stop: Stop, start_step: int = 0
) -> int:
    """Train from ``start_step`` to ``total_steps`` or until ``stop``; returns the number of updates of the run."""
    done = start_step
    while done < total_steps:
        batch = next(batches)
        try:
            loss = task(batch, done)
        except Exception as error:
            error.add_note(f"(in step {done + 1})")
            raise
        done += 1
        stopped = stop()
        for hook in hooks:
            hook(StepDone(done, stopped or done == total_steps, batch, loss))
        del batch  # else its views would be there while those of the next are made
        if stopped:
            break
    return done
