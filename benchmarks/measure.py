"""How Parallax measures: several contestants in interleaved rounds, so that a machine whose speed drifts is as unkind
to one as to another; means with 95 % intervals over rounds, ratios taken round by round."""

import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.energy import Meter
from sharding.progress import steps

_IDLE = 0.05  # of a core
_IDLE_SECONDS = 0.2
_NOISY = 0.1  # half of a 95 % interval, relative: beyond it a ratio decides nothing

# Student's t, 97.5 %, by degrees of freedom, from 1; for more than these the last one is a little too wide
_T = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Rate:
    """A quantity, such as images per second, one value a round; NaN where a round has none."""

    rounds: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.rounds)

    @property
    def margin(self) -> float:
        """Half of the 95 % interval of the mean (Student's t over rounds); infinite for one round."""
        n = len(self.rounds)
        return _T[min(n - 1, len(_T)) - 1] * float(np.std(self.rounds, ddof=1)) / math.sqrt(n) if n > 1 else math.inf

    def by_round(self, f: Callable[..., float], *others: "Rate") -> "Rate":
        """``f`` of this and the others, round by round."""
        return Rate(tuple(f(*values) for values in zip(self.rounds, *(o.rounds for o in others), strict=True)))

    def ratio(self, other: "Rate") -> "Rate":
        return self.by_round(lambda a, b: a / b, other)

    def over(self, divisor: float) -> "Rate":
        return self.by_round(lambda a: a / divisor)

    @property
    def is_noisy(self) -> bool:
        """Whether the rounds disagree too much to decide anything; of one round it is not known."""
        return len(self.rounds) > 1 and not self.margin <= _NOISY * abs(self.mean)  # nor where a round has no value

    def decided(self) -> str:
        """The value, or that the machine was too noisy for one."""
        if self.is_noisy:
            return f"too noisy (± {self.margin:.2g})"
        return f"{self.mean:.2f} ± {self.margin:.2f}" if len(self.rounds) > 1 else f"{self.mean:.2f} (one round)"

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "unknown"
        return f"{float(f'{self.mean:.4g}'):g} ± {float(f'{self.margin:.2g}'):g}"


Turn = Mapping[str, float]  # what a contestant reports of its turn, by quantity
Results = dict[str, dict[str, Rate]]  # by contestant and quantity


def interleave(contestants: Mapping[str, Callable[[], Turn]], rounds: int) -> Results:
    """Call every contestant once a round; odd rounds go backwards, so that none always follows the same other.

    Loaders go on filling their queues after their turn, so each turn begins when the one before has come to rest.
    """
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in contestants}
    turns = [name for i in range(rounds) for name in list(contestants)[:: -1 if i % 2 else 1]]
    for name in steps(turns, "measuring"):
        come_to_rest()
        for quantity, value in contestants[name]().items():
            found[name][quantity].append(value)
    return {name: {key: Rate(tuple(values)) for key, values in turns.items()} for name, turns in found.items()}


def rate_of(work: Callable[[], int], seconds: float, warmup: int, finish: Callable[[], None] = lambda: None) -> Turn:
    """Images per second of repeated ``work()``, which returns the images it did, the cores that it kept busy, as a
    percentage of one, and joules, where the machine tells; ``warmup`` calls are not timed.

    ``finish`` waits for what a device still has to do. The clock starts after that, and stops after that: to wait for
    each unit would keep the host from working ahead, as it does in a real run.
    """
    for _ in range(warmup):
        work()
    finish()
    cpu, meter, start = cpu_seconds(), Meter(), time.perf_counter()
    done = work()  # at least one, however busy the machine is
    while time.perf_counter() - start < seconds:
        done += work()
    finish()
    elapsed, joules = time.perf_counter() - start, meter.joules()
    turn = {"images_per_second": done / elapsed, "cpu_percent": 100 * (cpu_seconds() - cpu) / elapsed}
    return turn if joules is None else {**turn, "joules_per_1000_images": 1000 * joules / done}


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that torch's allocator has given out at a time within ``work()``, beyond what it had before: of a GPU as
    it counts itself, else of the CPU from a profile."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def come_to_rest(limit_seconds: float = 60.0) -> None:
    """Wait until this process and its descendants no longer compute. Raises TimeoutError when they go on."""
    start = time.perf_counter()
    while time.perf_counter() - start < limit_seconds:
        before = cpu_seconds() - time.thread_time()  # of others: looking is work of this thread
        time.sleep(_IDLE_SECONDS)
        if cpu_seconds() - time.thread_time() - before <= _IDLE * _IDLE_SECONDS:
            return
    raise TimeoutError(f"still computing {limit_seconds:.0f} s after a measurement ended")


def cpu_seconds() -> float:
    """Spent so far by this process and its living descendants."""
    family, ticks = [Path("/proc/self")], 0
    for process in family:  # which grows
        with suppress(OSError):  # it has ended
            for thread in (process / "task").iterdir():
                family += [Path("/proc", child) for child in _read(thread / "children").split()]
    for process in family[1:]:
        # After the name, which may hold anything: state, parent, ...; fields 14 and 15 are user and system time.
        ticks += sum(map(int, _read(process / "stat").rpartition(")")[2].split()[11:13]))
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def _read(path: Path) -> str:
    """Nothing of a process or thread that has ended."""
    try:
        return path.read_text()
    except OSError:
        return ""
