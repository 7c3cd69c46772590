"""Reading and decoding whole images, and nothing else: what no loader that decodes them the same way can exceed."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count

import numpy as np
import simplejpeg
import torch

from benchmarks.peers import PeerOptions
from pipeline.backends.dali.decode import Decoder, Encoded, largest_size
from pipeline.order import Ids, Shuffled, lane_shard_sizes
from pipeline.reading.reader import Reader


class DecodeOnly:
    """By libjpeg-turbo, in threads."""

    def __init__(self, options: PeerOptions) -> None:
        self._reader, self._batches = Reader(options.shards), _batches(options)
        self.num_ahead = options.num_ahead
        self._pool = ThreadPoolExecutor(options.num_threads, thread_name_prefix="decode-only")
        self._pending: deque[list[Future[None]]] = deque()
        self._prefetch = options.prefetch

    def next_batch(self) -> int:
        while len(self._pending) < self._prefetch:
            self._pending.append([self._pool.submit(self._decode, sample) for sample in next(self._batches).tolist()])
        batch = self._pending.popleft()
        for future in batch:
            future.result()
        return len(batch)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._reader.close()

    def _decode(self, sample: int) -> None:
        simplejpeg.decode_jpeg(self._reader.read(sample))


class DaliDecodeOnly:
    """By the graph of the ``dali`` backend, on a GPU if there is one."""

    def __init__(self, options: PeerOptions) -> None:
        self._reader, self._batches = Reader(options.shards), _batches(options)
        self.num_ahead = options.num_ahead
        device_id = torch.cuda.current_device() if torch.cuda.is_available() else None
        largest = largest_size(options.shards.index)
        self._decoder = Decoder(len(next(self._batches)), options.num_threads, device_id, largest)
        self._pending: deque[list[Encoded]] = deque()
        self._prefetch = options.prefetch

    def next_batch(self) -> int:
        while len(self._pending) < self._prefetch:
            self._pending.append(self._schedule(next(self._batches)))
        self._decoder.collect(None)
        return len(self._pending.popleft())

    def close(self) -> None:
        self._decoder.close()
        self._reader.close()

    def _schedule(self, ids: Ids) -> list[Encoded]:
        """The encoded images, which must live until they are decoded."""
        index = self._reader.shards.index
        encoded = [self._reader.read(sample) for sample in ids.tolist()]
        zeros = np.zeros_like(ids)
        self._decoder.schedule(
            encoded, np.stack([zeros, zeros, index.height[ids], index.width[ids]], 1).astype(np.int32)
        )
        return encoded


def _batches(options: PeerOptions) -> Iterator[Ids]:
    lanes = options.shards.manifest.num_lanes
    order = Shuffled(lane_shard_sizes(options.shards), 0, -(-options.batch_size // lanes) * lanes)
    return (order.batch(step)[0] for step in count())
