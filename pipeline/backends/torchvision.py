"""The reference: Pillow and torchvision's functional operations, exact by definition, in threads."""

import time

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import functional as F

from pipeline.backends import BackendContext
from pipeline.backends.pool import ThreadedBackend
from pipeline.plan import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewPlan
from sharding.planes import open_image

_ADJUST = {
    BRIGHTNESS: F.adjust_brightness,
    CONTRAST: F.adjust_contrast,
    SATURATION: F.adjust_saturation,
    HUE: F.adjust_hue,
}


def build(context: BackendContext) -> ThreadedBackend[Image.Image]:
    return ThreadedBackend(context, lambda data, *_: decode(data), render)


def decode(data: NDArray[np.uint8]) -> Image.Image:
    """Raises ValueError."""
    try:
        return open_image(data.tobytes())
    except OSError as error:
        raise ValueError(str(error)) from None


def render(image: Image.Image, plan: ViewPlan, row: int, out: NDArray[np.uint8]) -> tuple[float, float]:
    """Row ``row`` of a plan as ``out`` (size, size, 3); returns the seconds of geometry and photometric operations."""
    start = time.perf_counter()
    view = cut(image, plan, row)
    resampled = time.perf_counter()
    out[:] = np.asarray(adjust(view, plan, row))
    return resampled - start, time.perf_counter() - resampled


def adjust(view: Image.Image, plan: ViewPlan, row: int) -> Image.Image:
    """The photometric operations."""
    if plan.jitter[row]:
        view = _jitter(view, plan, row)
    if plan.grey[row]:
        view = F.rgb_to_grayscale(view, num_output_channels=3)
    if plan.sigma[row] > 0:
        view = F.gaussian_blur(view, [plan.spec.kernel] * 2, [float(plan.sigma[row])] * 2)
    if plan.solarize[row]:
        view = F.solarize(view, 128)
    return view


def _jitter(view: Image.Image, plan: ViewPlan, row: int) -> Image.Image:
    for operation in plan.order[row]:
        factor = float(plan.factors[row, operation])
        if operation == HUE and factor == 0:  # off: `ColorJitter` leaves it out, and a shift by 0 is not exact
            continue
        view = _ADJUST[int(operation)](view, factor)
    return view


def cut(image: Image.Image, plan: ViewPlan, row: int) -> Image.Image:
    """The geometry."""
    spec = plan.spec
    mode = F.InterpolationMode(spec.interpolation)
    if spec.crop == "center":
        view = F.center_crop(F.resize(image, [spec.resize], mode, antialias=True), [spec.size])
    else:
        top, left, height, width = plan.edge[row].tolist()
        view = F.resized_crop(image, top, left, height, width, [spec.size] * 2, mode, antialias=True)
    return F.hflip(view) if plan.flip[row] else view
