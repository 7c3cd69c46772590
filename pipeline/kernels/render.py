"""One view of one decoded image, as a `ViewPlan` describes it: geometry, then the photometric operations."""

import time

import numpy as np

from pipeline.kernels.photometric import adjust
from pipeline.kernels.resample import Bytes, Pixels, resample
from pipeline.plan import ViewPlan

# The kernels are joined here, in Python, and not by a compiled function: Numba's cache of compiled code would not
# notice a change in one of the kernels' files.


def render(image: Pixels, plan: ViewPlan, row: int, out: Bytes, top: int = 0, left: int = 0) -> tuple[float, float]:
    """Row ``row`` of a plan as ``out`` (size, size, 3) uint8, from an image that begins at (``top``, ``left``).

    Returns the seconds that geometry and photometric operations took.
    """
    start = time.perf_counter()
    view = np.empty((3, *out.shape[:2]), np.uint8)
    resample(image, top, left, plan.box[row], plan.edge[row], plan.flip[row], plan.spec.is_cubic, view)
    resampled = time.perf_counter()
    adjust(
        view,
        plan.jitter[row],
        plan.order[row],
        plan.factors[row],
        plan.grey[row],
        plan.sigma[row],
        plan.spec.kernel,
        plan.solarize[row],
        out,
    )
    return resampled - start, time.perf_counter() - resampled
