import numpy as np
import pytest
from numpy.testing import assert_array_equal

from pipeline.kernels.planes import fill
from sharding.planes import to_rgb

_UNTOUCHED = -1


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (4, 4), (7, 3), (6, 5), (33, 70), (40, 131)], ids=str)
def test_every_region_has_the_pixels_of_the_whole_image(size: tuple[int, int]) -> None:
    """And nothing else is written, so that a region may end where memory does."""
    rng, (height, width) = np.random.default_rng(0), size
    half = (height + 1) // 2, (width + 1) // 2
    luma, cb, cr = (rng.integers(0, 256, shape, np.uint8) for shape in (size, half, half))
    red, green, blue = np.moveaxis(to_rgb(luma, cb, cr).astype(np.int32), -1, 0)
    whole = red | green << 8 | blue << 16
    for _ in range(40):
        top, left = int(rng.integers(height)), int(rng.integers(width))
        region = np.array([top, left, rng.integers(1, height - top + 1), rng.integers(1, width - left + 1)])
        found = np.full((height, width + 1), _UNTOUCHED, np.int32)
        fill(luma, cb, cr, region, found)
        expected = np.full_like(found, _UNTOUCHED)
        part = np.s_[top : top + region[2], left : left + region[3]]
        expected[part] = whole[part]
        assert_array_equal(found, expected)
