"""Reading and decoding whole images, and nothing else: what no loader that decodes them the same way can exceed."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.peers import PeerOptions
from pipeline.backends import Backend, BackendContext, Pending, Views
from pipeline.backends.cpu import Decoder
from pipeline.backends.dali.backend import DaliBackend
from pipeline.backends.pool import ThreadedBackend
from pipeline.order import Shuffled, lane_shard_sizes
from pipeline.plan import plan_samples
from pipeline.reading.reader import Reader
from pipeline.stats import Stats
from pipeline.views import ViewSpec

_CPU = torch.device("cpu")
_WHOLE = ViewSpec(size=1, crop="center", resize=1, blur=0)  # a view that would need the whole image


class DecodeOnly:
    """The batches of a backend that makes no view of what it has decoded."""

    def __init__(self, options: PeerOptions, build: Callable[[BackendContext], Backend], device: torch.device) -> None:
        self._shards, self._prefetch, self.num_ahead = options.shards, options.prefetch, options.num_ahead
        lanes = options.shards.manifest.num_lanes
        self._order = Shuffled(lane_shard_sizes(options.shards), 0, -(-options.batch_size // lanes) * lanes)
        self._reader = Reader(options.shards)
        self._backend = build(BackendContext(self._reader, self._order.global_batch_size, options.num_threads, device))
        self._pending: deque[Pending] = deque()
        self._step = 0

    def next_batch(self) -> int:
        while len(self._pending) < self._prefetch:
            plan = plan_samples(self._shards, [_WHOLE], 0, self._step, *self._order.batch(self._step))
            self._pending.append(self._backend.submit(plan))
            self._step += 1
        self._pending.popleft().result()
        return self._order.global_batch_size

    def close(self) -> None:
        self._backend.close()
        self._reader.close()


class _NoRenderer:
    """See `pipeline.backends.dali.backend.Renderer`."""

    stream = None

    def start(self, *_: Any) -> Callable[[], Views]:
        return list

    def stats(self) -> Stats:
        return Stats()

    def close(self) -> None: ...


def build_cpu(options: PeerOptions) -> DecodeOnly:
    """By libjpeg-turbo, in threads."""
    return DecodeOnly(options, lambda context: ThreadedBackend(context, Decoder(), lambda *_: (0.0, 0.0)), _CPU)


def build_dali(options: PeerOptions) -> DecodeOnly:
    """By DALI, on a GPU if there is one."""
    device = torch.device("cuda") if torch.cuda.is_available() else _CPU
    return DecodeOnly(options, lambda context: DaliBackend(context, _NoRenderer()), device)
