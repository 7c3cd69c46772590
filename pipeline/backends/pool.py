"""What the backends that spread a batch over a pool of workers share: chunks of rows, and a batch in the making."""

from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

from pipeline.backends import UndecodableError, Views

_CHUNKS_PER_WORKER = 4  # so that the last worker of a batch is not far behind the others


STAGES = "decode", "geometry", "photometric"


@dataclass
class Done:
    """What a worker says of a chunk, and the sum of it: ``reasons`` of undecodable samples by id, seconds by stage."""

    reasons: dict[int, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def add(self, other: "Done") -> None:
        self.reasons |= other.reasons
        self.spend(**other.seconds)

    def spend(self, **seconds: float) -> None:
        for stage, value in seconds.items():
            self.seconds[stage] += value

    def stats(self) -> dict[str, float]:
        return {f"{stage}_seconds": self.seconds[stage] for stage in STAGES}


def chunks(num_rows: int, num_workers: int) -> list[slice]:
    """Slices of nearly equal length that cover the rows of a batch."""
    count = min(num_rows, num_workers * _CHUNKS_PER_WORKER)
    return [slice(i * num_rows // count, (i + 1) * num_rows // count) for i in range(count)]


class PooledBatch:
    """A `Pending` whose chunks are ``futures``; ``collect`` stores a chunk's result and says how it went."""

    def __init__(self, views: Views, futures: list[Future], collect: Callable[[int, Future], Done]) -> None:
        self._views, self._futures, self._collect = views, futures, collect

    def done(self) -> bool:
        return all(future.done() for future in self._futures)

    def result(self, timeout: float | None = None) -> Views:
        if wait(self._futures, timeout).not_done:
            raise TimeoutError
        reasons: dict[int, str] = {}
        for number, future in enumerate(self._futures):
            reasons |= self._collect(number, future).reasons
        if reasons:
            raise UndecodableError(reasons)
        return self._views
