"""What the backends that spread a batch over a pool of workers share: chunks of rows, and a batch in the making."""

from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

from pipeline.backends import DamagedSampleError, Views
from pipeline.stats import Stats

_CHUNKS_PER_WORKER = 4  # so that the last worker of a batch is not far behind the others


@dataclass
class ChunkReport:
    """What a worker says of a chunk: why samples are damaged, by id, and its seconds by stage, as those of `Stats`."""

    reasons: dict[int, str] = field(default_factory=dict)
    read_seconds: float = 0.0
    decode_seconds: float = 0.0
    geometry_seconds: float = 0.0
    photometric_seconds: float = 0.0

    def stats(self) -> Stats:
        return Stats(
            read_seconds=self.read_seconds,
            decode_seconds=self.decode_seconds,
            geometry_seconds=self.geometry_seconds,
            photometric_seconds=self.photometric_seconds,
        )


def chunks(num_rows: int, num_workers: int) -> list[slice]:
    """Slices of nearly equal length that cover the rows of a batch."""
    count = min(num_rows, num_workers * _CHUNKS_PER_WORKER)
    return [slice(i * num_rows // count, (i + 1) * num_rows // count) for i in range(count)]


class PooledBatch:
    """A `Pending` whose chunks are ``futures``; ``collect`` stores a chunk's result and says how it went."""

    def __init__(self, views: Views, futures: list[Future], collect: Callable[[int, Future], ChunkReport]) -> None:
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
            raise DamagedSampleError(reasons)
        return self._views
