"""The views of a batch on a GPU: geometry, then the photometric operations, on a stream of their own."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.backends import DamagedSampleError, Views
from pipeline.kernels.photometric_gpu import apply_photometric
from pipeline.kernels.resample_gpu import Images, resample
from pipeline.plan import BatchPlan, Ints
from pipeline.stats import Stats
from pipeline.transfer import upload


class GpuRenderer:
    """See `pipeline.backends.dali.backend.Renderer`. It takes whole images."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stream = torch.cuda.Stream(device)

    def start(self, images: Any, plan: BatchPlan) -> Callable[[], Views]:
        check_sizes(np.array(images.shape())[:, :2], plan.regions, plan.ids)
        views = make_views(locate(images, self._device), plan)
        done = torch.cuda.Event(blocking=True)
        done.record()
        return partial(self._wait, done, images, views)

    def _wait(self, done: torch.cuda.Event, images: Any, views: Views) -> Views:  # noqa: ARG002
        """Holds DALI's ``images`` until the *host* has seen that the kernels have read them.

        nvJPEG's hardware decoder ignores the order of streams: it writes its output before work that was queued earlier
        on the same stream has run (pytorch/torchcodec#1634, pytorch/vision#9606), so an event that a stream waits for
        protects no memory that is decoded into again. The views have had the loader's prefetching to be made; if they
        are late all the same, the host's wait counts it.
        """
        done.synchronize()
        current = torch.cuda.current_stream(self._device)
        for view in views:
            view.record_stream(current)
        return views

    def stats(self) -> Stats:
        """None: measuring the stages would make the host wait for each."""
        return Stats()

    def close(self) -> None:
        self.stream.synchronize()


def locate(images: Any, device: torch.device) -> Images:
    """The images of a DALI list, which must outlive their use."""
    addresses = np.array([image.data_ptr() for image in images])
    widths = np.array([shape[1] for shape in images.shape()])
    return Images(upload(addresses, device), upload(widths, device))


def check_sizes(sizes: NDArray[np.int64], regions: Ints, ids: Ints) -> None:
    """Raises `DamagedSampleError` for images whose ``sizes`` (n, 2) do not hold their ``regions``: kernels would read
    what lies behind them."""
    beyond = (regions[:, :2] + regions[:, 2:] > sizes).any(axis=1)
    if beyond.any():
        reasons = {
            int(ids[row]): f"decoded to {sizes[row].tolist()} pixels, fewer than the index says"
            for row in np.flatnonzero(beyond)
        }
        raise DamagedSampleError(reasons)


def make_views(images: Images, plan: BatchPlan) -> Views:
    """All views of decoded images, on their device."""
    views = []
    for view_plan in plan.views:
        view = resample(images, view_plan)
        apply_photometric(view, view_plan)
        views.append(view)
    return views
