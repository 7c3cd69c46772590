"""From planes of YCbCr 4:2:0 to pixels, as libjpeg-turbo makes them; `sharding.planes` has the definition."""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.kernels.resample import Bytes, Int32s

_HALF, _SHIFT = np.int32(1 << 15), np.int32(16)  # of the conversion's factors, which have 16 bits of fraction


@njit(nogil=True, cache=True)
def fill(luma: Bytes, cb: Bytes, cr: Bytes, region: NDArray[np.int64], out: Int32s) -> None:
    """Convert the part ``region`` (top, left, height, width) of an image into ``out``, which has room for all of it:
    (h, at least w), a pixel a word, R in its lowest byte. The rest of ``out`` stays as it is.
    """
    top, left, height, width = region
    first = left // 2  # column of the planes
    sums = np.empty(cb.shape[1] + 2, np.int32)
    u_pairs, v_pairs = np.empty((2, 2 * ((left + width + 1) // 2 - first)), np.int32)
    us, vs = u_pairs[left % 2 :], v_pairs[left % 2 :]
    for y in range(top, top + height):
        _upsample(cb, y, first, sums, u_pairs)
        _upsample(cr, y, first, sums, v_pairs)
        _convert(luma[y, left : left + width], us, vs, out[y, left : left + width])


@njit(nogil=True, cache=True, inline="always")
def _upsample(plane: Bytes, y: int, first: int, sums: Int32s, out: Int32s) -> None:
    """Chroma, less 128, of image row ``y`` from column ``2 * first`` on: 3/4 of the nearer and 1/4 of the farther
    sample along each axis. ``sums`` is memory for a row of the plane and one sample more at both ends."""
    rows, columns = plane.shape
    reach = 1 if columns > 2 else 0  # libjpeg repeats the samples of planes of one or two columns
    near = y // 2
    far = min(max(near + (reach if y % 2 else -reach), 0), rows - 1)
    nearer, farther, inner = plane[near], plane[far], sums[1:]
    for i in range(columns):
        inner[i] = np.int32(np.int32(3) * np.int32(nearer[i])) + np.int32(farther[i])
    sums[0], sums[columns + 1] = sums[1], sums[columns]
    here, before, after = sums[first + 1 :], sums[first + 1 - reach :], sums[first + 1 + reach :]
    for i in range(len(out) // 2):
        most = np.int32(np.int32(3) * here[i])
        out[2 * i] = np.int32(np.int32(most + before[i] + np.int32(8)) >> np.int32(4)) - np.int32(128)
        out[2 * i + 1] = np.int32(np.int32(most + after[i] + np.int32(7)) >> np.int32(4)) - np.int32(128)


@njit(nogil=True, cache=True, inline="always")
def _convert(luma: Bytes, us: Int32s, vs: Int32s, out: Int32s) -> None:
    """A row by JFIF's factors 1.402, 0.34414, 0.71414 and 1.772."""
    for x in range(len(out)):
        y, u, v = np.int32(luma[x]), us[x], vs[x]
        red = _clip(y + (np.int32(np.int32(np.int32(91881) * v) + _HALF) >> _SHIFT))
        mixed = np.int32(np.int32(np.int32(-22554) * u) + np.int32(np.int32(-46802) * v))
        green = _clip(y + (np.int32(mixed + _HALF) >> _SHIFT))
        blue = _clip(y + (np.int32(np.int32(np.int32(116130) * u) + _HALF) >> _SHIFT))
        out[x] = red + np.int32(green * np.int32(1 << 8)) + np.int32(blue * np.int32(1 << 16))


@njit(nogil=True, cache=True, inline="always")
def _clip(level: np.int32) -> np.int32:
    return min(max(np.int32(level), np.int32(0)), np.int32(255))
