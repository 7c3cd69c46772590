"""The views of a batch on a GPU: geometry, then the photometric operations, on a stream of their own."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from pipeline.backends import Views
from pipeline.photometric_gpu import apply_photometric
from pipeline.plan import BatchPlan
from pipeline.resample_gpu import resample


class GpuRenderer:
    """See `pipeline.backends.dali.Renderer`. It takes whole images."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stream = torch.cuda.Stream(device)

    def start(self, images: Iterable[Any], regions: object, plan: BatchPlan) -> Callable[[], Views]:  # noqa: ARG002
        with torch.cuda.device(self._device), torch.cuda.stream(self.stream):
            # DALI has bound its images to this stream, so it frees them in this stream's order: after the kernels.
            views = make_views([from_dlpack(image) for image in images], plan)
            done = self.stream.record_event()

        def wait() -> Views:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(done)
            for view in views:
                view.record_stream(current)
            return views

        return wait

    def stats(self) -> dict[str, float]:
        """None: measuring a stream would make the host wait for it."""
        return {}

    def close(self) -> None:
        self.stream.synchronize()


def make_views(images: Sequence[torch.Tensor], plan: BatchPlan) -> Views:
    """All views of decoded images (h, w, 3) uint8, on their device."""
    views = []
    for view_plan in plan.views:
        view = resample(images, view_plan)
        apply_photometric(view, view_plan)
        views.append(view)
    return views
