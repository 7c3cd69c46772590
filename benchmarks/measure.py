"""How Parallax measures: rates of several contestants in interleaved rounds, so that a machine whose speed drifts is
as unkind to one as to another; medians with their spread, and ratios taken round by round."""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_IDLE = 0.05  # of a core
_IDLE_SECONDS = 0.2


@dataclass(frozen=True)
class Rate:
    """Units per second, one value a round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def ratio(self, other: "Rate") -> "Rate":
        """This over the other, round by round."""
        return Rate(tuple(a / b for a, b in zip(self.rounds, other.rounds, strict=True)))

    def __str__(self) -> str:
        return f"{self.median:.4g} ({min(self.rounds):.4g} to {max(self.rounds):.4g})"


def interleave(contestants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Rate]:
    """Call every contestant once a round, in turn; each returns its rate in that round.

    Loaders go on filling their queues after their turn, so each turn begins when the one before has come to rest.
    """
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for name in interleaved_names(list(contestants), rounds):
        come_to_rest()
        rates[name].append(contestants[name]())
    return {name: Rate(tuple(values)) for name, values in rates.items()}


def interleaved_names(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Every name once a round; odd rounds go backwards, so that no contestant always follows the same other."""
    for i in range(rounds):
        yield from names if i % 2 == 0 else reversed(names)


def rate_of(work: Callable[[], int], seconds: float, warmup: int, finish: Callable[[], None] = lambda: None) -> float:
    """Units per second of repeated ``work()``, which returns the units it did; ``warmup`` calls are not timed.

    ``finish`` waits for what a device still has to do. The clock starts after that, and stops after that: to wait for
    each unit would keep the host from working ahead, as it does in a real run.
    """
    for _ in range(warmup):
        work()
    finish()
    start = time.perf_counter()
    done = work()  # at least one, however busy the machine is
    while time.perf_counter() - start < seconds:
        done += work()
    finish()
    return done / (time.perf_counter() - start)


def come_to_rest(limit_seconds: float = 60.0) -> None:
    """Wait until this process and its descendants no longer compute. Raises TimeoutError when they go on."""
    start = time.perf_counter()
    while time.perf_counter() - start < limit_seconds:
        before = _cpu_seconds()
        time.sleep(_IDLE_SECONDS)
        if _cpu_seconds() - before <= _IDLE * _IDLE_SECONDS:
            return
    raise TimeoutError(f"still computing {limit_seconds:.0f} s after a measurement ended")


def _cpu_seconds() -> float:
    """Spent so far by this process and its living descendants."""
    processes = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # After the name, which may hold anything: state, parent, ...; fields 14 and 15 are user and system time.
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        processes[int(path.parent.name)] = int(fields[1]), int(fields[11]) + int(fields[12])
    family = {os.getpid()}
    while children := {pid for pid, (parent, _) in processes.items() if parent in family} - family:
        family |= children
    return sum(ticks for pid, (_, ticks) in processes.items() if pid in family) / os.sysconf("SC_CLK_TCK")
