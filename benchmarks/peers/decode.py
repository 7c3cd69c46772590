"""Reading and decoding whole images by libjpeg-turbo, in threads, and nothing else."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import simplejpeg

from benchmarks.peers import PeerOptions
from pipeline.loader import lane_shard_sizes
from pipeline.order import Order
from pipeline.reader import Reader


class DecodeOnly:
    def __init__(self, options: PeerOptions) -> None:
        shards = options.shards
        lanes = shards.manifest.num_lanes
        self._reader = Reader(shards)
        self._order = Order(lane_shard_sizes(shards), 0, -(-options.batch_size // lanes) * lanes)
        self._pool = ThreadPoolExecutor(options.num_threads, thread_name_prefix="decode-only")
        self._pending: deque[list[Future[None]]] = deque()
        self._prefetch, self._step = options.prefetch, 0

    def next_batch(self) -> int:
        while len(self._pending) < self._prefetch:
            ids, _ = self._order.ids(self._step)
            self._pending.append([self._pool.submit(self._decode, sample) for sample in ids.tolist()])
            self._step += 1
        batch = self._pending.popleft()
        for future in batch:
            future.result()
        return len(batch)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._reader.close()

    def _decode(self, sample: int) -> None:
        simplejpeg.decode_jpeg(self._reader.read(sample))


build = DecodeOnly
