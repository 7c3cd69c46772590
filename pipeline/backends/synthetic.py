"""No images at all: random views, made once. The ceiling of any loader, for benchmarks of what follows it."""

from concurrent.futures import Future

import torch

from pipeline.backends import BackendContext, Views
from pipeline.plan import BatchPlan
from pipeline.stats import Stats


class SyntheticBackend:
    def __init__(self, context: BackendContext) -> None:
        self._device, self._batch_size = context.device, context.batch_size
        self._views: Views = []

    def submit(self, plan: BatchPlan) -> "Future[Views]":
        self._views = self._views or self._make(plan)
        future: Future[Views] = Future()
        future.set_result([view[: len(plan)] for view in self._views])
        return future

    def stats(self) -> Stats:
        return Stats()

    def close(self) -> None:
        self._views = []

    def _make(self, plan: BatchPlan) -> Views:
        generator = torch.Generator().manual_seed(0)
        shapes = [(self._batch_size, view.spec.size, view.spec.size, 3) for view in plan.views]
        views = [torch.randint(256, shape, dtype=torch.uint8, generator=generator) for shape in shapes]
        return [view.to(self._device) for view in views]


build = SyntheticBackend
