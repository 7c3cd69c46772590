"""Which shards the coming steps read, so that they can be fetched before they are needed."""

from collections import Counter, deque

import numpy as np
from numpy.typing import NDArray

from pipeline.order import Order, Shuffled, ShuffledPart
from sharding.command import UserError
from sharding.manifest import ShardSet

_STEPS_PER_CALL = 16  # looked at in one call at most, so that no call is slow


class LookAhead:
    """Looks ahead along an order as far as the distinct shards that one rank reads on the way fit ``max_bytes`` (by
    default two windows), and at most one pass over the data. ``rows`` is the rank's slice of a global batch.

    Raises ValueError when not even the shards fit among which it shuffles at a time.
    """

    def __init__(self, shards: ShardSet, order: Order, rows: slice, max_bytes: int | None = None) -> None:
        self._order, self._rows = order, rows
        self._shard_of = shards.index.shard
        self._sizes = np.array([shard.num_bytes for shard in shards.manifest.shards])
        self._ahead: deque[tuple[int, NDArray[np.int32]]] = deque()
        self._uses: Counter[int] = Counter()
        least_bytes = self._least_bytes(np.array([shard.lane for shard in shards.manifest.shards]))
        self._max_bytes = 2 * least_bytes if max_bytes is None else max_bytes
        if least_bytes > self._max_bytes:
            cures = "raise data.cache_bytes"
            if isinstance(order, Shuffled):
                cures += f", or lower data.window (now {order.window or 'none: all'})"
            raise UserError(
                f"cache: this process shuffles among {least_bytes} bytes of shards at a time and may keep "
                f"{self._max_bytes} of them; {cures}"
            )

    def advance(self, step: int) -> list[int]:
        """Go on to ``step``, never back: rows of the manifest that it and the steps after it read, by first use."""
        while self._ahead and self._ahead[0][0] < step:
            self._uses.subtract(self._ahead.popleft()[1].tolist())
        self._uses = +self._uses
        for _ in range(_STEPS_PER_CALL):
            if not self._look_further(step):
                break
        return list(self._uses)

    def _look_further(self, step: int) -> bool:
        ahead = self._ahead[-1][0] + 1 if self._ahead else step
        if ahead == self._order.num_steps or (ahead - step) * self._order.global_batch_size > len(self._shard_of):
            return False
        used = np.unique(self._shards_of(ahead))
        union = np.union1d(used, np.fromiter(self._uses, np.int64))
        if self._sizes[union].sum() > self._max_bytes:
            return False
        self._ahead.append((ahead, used))
        self._uses.update(used.tolist())
        return True

    def _shards_of(self, step: int) -> NDArray[np.int32]:
        return self._shard_of[self._order.batch(step)[0][self._rows]]

    def _least_bytes(self, lanes: NDArray[np.int64]) -> int:
        """Of the shards among which samples are shuffled at a time: the largest that a window can hold, over this
        rank's lanes, or all of those of a part."""
        if isinstance(self._order, ShuffledPart):
            return int(self._sizes[np.unique(self._shard_of[self._order.chosen])].sum())
        if not isinstance(self._order, Shuffled):
            return 0
        mine, window = np.unique(lanes[self._shards_of(0)]), self._order.window
        return sum(int(np.sort(self._sizes[lanes == lane])[::-1][:window].sum()) for lane in mine)
