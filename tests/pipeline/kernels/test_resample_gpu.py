from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from pipeline.kernels.resample_gpu import resample
from tests.pipeline.gpu_kernels import SAME_RESIZE, expected, noise, on_device, plan_for

# Wide, tall, as large as the view, smaller than it, much larger than it.
IMAGES = [noise(h, w) for h, w in ((37, 50), (90, 41), (24, 24), (13, 20), (300, 40), (40, 300))]
GEOMETRY_ONLY: dict[str, Any] = {"jitter": 0, "grey": 0, "blur": 0}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "spec",
    [
        {"size": 24},
        {"size": 24, "scale": (0.9, 1.0), "ratio": (0.5, 2.0)},  # rows first for some, columns first for others
        {"size": 33, "flip": 1},
        {"size": 20, "crop": "center", "resize": 24},
        {"size": 3, "scale": (1.0, 1.0)},
    ],
)
def test_equals_pillow(spec: dict[str, Any], interpolation: str) -> None:
    plan = plan_for(IMAGES, **GEOMETRY_ONLY, **spec, interpolation=interpolation)
    with on_device(IMAGES) as images:
        views = resample(images, plan).cpu().numpy()
    if SAME_RESIZE:
        assert_array_equal(views, expected(IMAGES, plan))
    else:
        assert np.abs(views.astype(int) - expected(IMAGES, plan)).max() <= 1


def test_reads_nothing_outside_the_crop() -> None:
    """Torchvision crops before it resizes."""
    image = np.zeros((40, 40, 3), np.uint8)
    plan = plan_for([image], size=8, flip=0, scale=(0.2, 0.3), **GEOMETRY_ONLY)
    top, left, height, width = plan.edge[0]
    assert 0 < top < top + height < 40
    assert 0 < left < left + width < 40
    image[:] = 255
    image[top : top + height, left : left + width] = 7
    with on_device([image]) as images:
        assert_array_equal(resample(images, plan).cpu().numpy(), np.full((1, 8, 8, 3), 7))
