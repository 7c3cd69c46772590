"""No images at all: random views, made once. The ceiling of any loader, for benchmarks of what follows it."""

from concurrent.futures import Future

import torch

from pipeline.backends import BackendOptions, Views
from pipeline.plan import BatchPlan


class SyntheticBackend:
    def __init__(self, options: BackendOptions) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = [(options.batch_size, spec.size, spec.size, 3) for spec in options.specs]
        views = [torch.randint(256, shape, dtype=torch.uint8, generator=generator) for shape in shapes]
        self._views = [view.to(options.device) for view in views]

    def submit(self, plan: BatchPlan) -> "Future[Views]":
        future: Future[Views] = Future()
        future.set_result([view[: len(plan)] for view in self._views])
        return future

    def stats(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self._views = []


build = SyntheticBackend
