"""How Parallax measures: rates of several contestants in interleaved rounds, so that a machine whose speed drifts is
as unkind to one as to another; medians with their spread, and ratios taken round by round."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass


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
    """Call every contestant once a round, in turn; each returns its rate in that round."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for name in interleaved_names(list(contestants), rounds):
        rates[name].append(contestants[name]())
    return {name: Rate(tuple(values)) for name, values in rates.items()}


def interleaved_names(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Every name once a round; odd rounds go backwards, so that no contestant always follows the same other."""
    for i in range(rounds):
        yield from names if i % 2 == 0 else reversed(names)


def rate_of(work: Callable[[], int], seconds: float, warmup: int) -> float:
    """Units per second of repeated ``work()``, which returns the units it did; ``warmup`` calls are not timed."""
    for _ in range(warmup):
        work()
    done, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        done += work()
    return done / elapsed
