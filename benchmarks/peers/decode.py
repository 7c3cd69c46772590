"""Reading and decoding whole images, and nothing else: what no loader that decodes them the same way can exceed."""

from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from importlib import import_module
from itertools import count
from typing import Any

import torch

from benchmarks.peers import Peer, PeerOptions
from pipeline.backends import Backend, BackendContext, Pending, Views
from pipeline.backends.cpu import Decoder
from pipeline.backends.dali.backend import DaliBackend
from pipeline.backends.pool import ChunkReport, Pool, ThreadedBackend
from pipeline.order import Shuffled, lane_shard_sizes
from pipeline.plan import BatchPlan, plan_samples
from pipeline.reading.reader import Reader
from pipeline.stats import Stats
from pipeline.views import ViewSpec

_CPU = torch.device("cpu")
_WHOLE = ViewSpec(size=1, crop="center", resize=1, blur=0)  # a view that would need the whole image


def _decode_only(
    options: PeerOptions, stack: ExitStack, build: Callable[[BackendContext], Backend], device: torch.device
) -> Peer:
    """The batches of a backend that makes no view of what it has decoded."""
    lanes = options.shards.manifest.num_lanes
    order = Shuffled(lane_shard_sizes(options.shards), 0, -(-options.batch_size // lanes) * lanes)
    reader = stack.enter_context(closing(Reader(options.shards)))
    backend = build(BackendContext(reader, order.global_batch_size, options.num_threads, device))
    stack.callback(backend.close)
    steps, pending = count(), deque[Pending]()

    def next_batch() -> int:
        while len(pending) < options.prefetch:
            step = next(steps)
            pending.append(backend.submit(plan_samples(options.shards, [_WHOLE], 0, step, *order.batch(step))))
        pending.popleft().result()
        return order.global_batch_size

    return next_batch


class _NoRenderer:
    """See `pipeline.backends.dali.backend.Renderer`."""

    stream = None

    def start(self, *_: Any) -> Callable[[], Views]:
        return list

    def stats(self) -> Stats:
        return Stats()

    def close(self) -> None: ...


def build_cpu(options: PeerOptions, stack: ExitStack) -> Peer:
    """By libjpeg-turbo, in threads."""
    return _decode_only(
        options, stack, lambda context: ThreadedBackend(context, Decoder(), lambda *_: (0.0, 0.0)), _CPU
    )


def build_dali(options: PeerOptions, stack: ExitStack) -> Peer:
    """By DALI, on a GPU if there is one."""
    device = torch.device("cuda") if torch.cuda.is_available() else _CPU
    return _decode_only(options, stack, lambda context: DaliBackend(context, _NoRenderer()), device)


def build_torchcodec(options: PeerOptions, stack: ExitStack) -> Peer:
    """By torchcodec, on a GPU if there is one, in pieces of a batch."""
    decoders = import_module("torchcodec.decoders")
    device = "cuda" if torch.cuda.is_available() else "cpu"

    class Pieces(Pool):
        def __init__(self, context: BackendContext) -> None:
            super().__init__(context.num_threads, "torchcodec", context.reader.watch)
            self._read = context.reader.read

        def submit(self, plan: BatchPlan) -> Pending:
            return self.spread(partial(self._decode, plan), len(plan), list)

        def _decode(self, plan: BatchPlan, rows: slice) -> ChunkReport:
            decoders.decode_jpeg(
                [torch.from_numpy(self._read(sample)) for sample in plan.ids[rows].tolist()], device=device
            )
            return ChunkReport()

    return _decode_only(options, stack, Pieces, _CPU)
