"""Geometry: crop, antialiased bilinear or bicubic resize and horizontal flip, in Pillow's own integer arithmetic.

Pillow resizes 8-bit images by a horizontal and then a vertical pass, both with 22-bit fixed-point weights and both
rounded to 8 bits (`ImagingResample`), so the same arithmetic gives the same pixels. A pixel is a uint32, its bytes R,
G, B and one that means nothing (see `as_pixels`). Both passes are the same vectorised combination of long rows; for the
horizontal one, strips of the image are transposed on the way in and out.
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

Pixels = NDArray[np.uint32]  # (h, w), R in the lowest byte
Bytes = NDArray[np.uint8]
Int32s = NDArray[np.int32]

_PRECISION = 22  # bits of a weight's fraction; 8 bits of pixel and 2 of headroom fill 32
_HALF = np.int32(1 << (_PRECISION - 1))
_SHIFT = np.int32(_PRECISION)
_STRIP = 32  # rows transposed at a time: as many as keep the strip of a 500 px wide image near the first-level cache


def as_pixels(memory: Bytes, height: int, width: int) -> Pixels:
    """An image in packed RGB, without a copy. Each word reaches one byte into the next pixel, so ``memory`` has a byte
    more than the image, 3 * height * width + 1; with fewer, ValueError.
    """
    return np.ndarray((height, width), np.uint32, memory, strides=(3 * width, 3))


class Taps(NamedTuple):
    """Which source pixels, with which weights, make up each of n output pixels along one axis.

    first (n,) int32: the first source pixel; length (n,) int32: how many; weights (n, at least that) int32, in units of
    2**-22; most: the greatest length, but at least 4 for the cubic filter, which overshoots, so that sums are clipped
    """

    first: Int32s
    length: Int32s
    weights: Int32s
    most: int


@njit(nogil=True, cache=True)
def _filter(x: float, cubic: bool) -> float:
    """A triangle of radius 1, or the cubic convolution of radius 2 with a = -0.5 (Keys, 1981) as Pillow writes it."""
    x = abs(x)
    if not cubic:
        return max(1.0 - x, 0.0)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5 if x < 2.0 else 0.0


@njit(nogil=True, cache=True)
def find_taps(start: float, extent: float, limit: int, size: int, reverse: bool, cubic: bool) -> Taps:
    """Taps for resizing ``[start, start + extent)`` of an axis of ``limit`` pixels to ``size`` pixels.

    The filter widens with the scale when it shrinks the image (antialiasing); ``reverse`` mirrors the output.
    """
    scale = extent / size
    widening = max(scale, 1.0)
    support = 2.0 * widening if cubic else widening
    first, length = np.empty(size, np.int32), np.empty(size, np.int32)
    weights = np.zeros((size, 2 * int(np.ceil(support)) + 2), np.int32)
    raw = np.empty(weights.shape[1], np.float64)
    for i in range(size):
        centre = start + (i + 0.5) * scale
        low = max(int(centre - support + 0.5), 0)
        high = min(int(centre + support + 0.5), limit)
        total = 0.0
        for k in range(high - low):
            raw[k] = _filter((low + k - centre + 0.5) * (1.0 / widening), cubic)
            total += raw[k]
        out = size - 1 - i if reverse else i
        first[out], length[out] = low, high - low
        for k in range(high - low):
            weight = raw[k] / total * (1 << _PRECISION)
            weights[out, k] = int(weight + 0.5) if weight >= 0 else int(weight - 0.5)
    return Taps(first, length, weights, max(length.max(), 4 if cubic else 0))


@njit(nogil=True, cache=True)
def _span(taps: Taps) -> tuple[int, int]:
    """The source pixels [first, end) that taps read."""
    ends = taps.first[0] + taps.length[0], taps.first[-1] + taps.length[-1]
    return min(taps.first[0], taps.first[-1]), max(ends)


@njit(nogil=True, cache=True, inline="always")
def _times(pixel: np.uint8, weight: np.int32) -> np.int32:
    return np.int32(np.int32(pixel) * weight)


@njit(nogil=True, cache=True, inline="always")
def _clip(total: np.int32) -> np.int32:
    """To 8 bits; see `Taps`."""
    return min(max(total >> _SHIFT, np.int32(0)), np.int32(255))


@njit(nogil=True, cache=True, inline="always")
def _combine(rows: Bytes, begin: int, taps: Taps, width: int, sums: Int32s, out: Bytes) -> None:
    """``out[j]`` = the weighted sum of the rows that taps name for output j; row 0 is number ``begin`` to the taps.

    Nearly all time of a resize is spent here. Up to four taps are combined without storing ``sums`` (width,) int32; of
    the bilinear filter, three are enough for one and a half source pixels to one. Rows are indexed and not sliced,
    which would count references.
    """
    first, weights, last = taps.first, taps.weights, len(rows) - 1
    for j in range(len(first)):
        a = first[j] - begin
        b, c, d = min(a + 1, last), min(a + 2, last), min(a + 3, last)
        u, v, w, z = weights[j, 0], weights[j, 1], weights[j, 2], weights[j, 3]
        if taps.most <= 2:
            for i in range(width):
                out[j, i] = np.int32(_times(rows[a, i], u) + np.int32(_times(rows[b, i], v) + _HALF)) >> _SHIFT
        elif taps.most == 3:
            for i in range(width):
                total = np.int32(_times(rows[b, i], v) + np.int32(_times(rows[c, i], w) + _HALF))
                out[j, i] = np.int32(_times(rows[a, i], u) + total) >> _SHIFT
        elif taps.most == 4:
            for i in range(width):
                total = np.int32(_times(rows[c, i], w) + np.int32(_times(rows[d, i], z) + _HALF))
                out[j, i] = _clip(np.int32(_times(rows[a, i], u) + np.int32(_times(rows[b, i], v) + total)))
        else:
            for i in range(width):
                total = np.int32(_times(rows[c, i], w) + np.int32(_times(rows[d, i], z) + _HALF))
                sums[i] = np.int32(_times(rows[a, i], u) + np.int32(_times(rows[b, i], v) + total))
            for k in range(4, taps.length[j], 2):
                b, c, u, v = a + k, min(a + k + 1, last), weights[j, k], weights[j, k + 1]
                for i in range(width):
                    sums[i] += np.int32(_times(rows[b, i], u) + _times(rows[c, i], v))
            for i in range(width):
                out[j, i] = _clip(sums[i])


@njit(nogil=True, cache=True)
def _resize_rows(image: Pixels, begin: int, taps: Taps, out: Pixels) -> None:
    """The horizontal pass; column 0 of ``image`` is number ``begin`` to the taps."""
    height, width = image.shape
    size = len(taps.first)
    strip = np.empty((width, _STRIP), np.uint32)
    resized = np.empty((size, _STRIP), np.uint32)
    strip_bytes, resized_bytes = strip.view(np.uint8), resized.view(np.uint8)
    sums = np.empty(4 * _STRIP, np.int32)
    for y in range(0, height, _STRIP):
        rows = min(_STRIP, height - y)
        if rows == _STRIP:
            for x in range(width):
                for i in range(_STRIP):
                    strip[x, i] = image[y + i, x]
        else:
            for x in range(width):
                for i in range(rows):
                    strip[x, i] = image[y + i, x]
        _combine(strip_bytes, begin, taps, 4 * _STRIP, sums, resized_bytes)
        for i in range(rows):
            for x in range(size):
                out[y + i, x] = resized[x, i]


@njit(nogil=True, cache=True)
def _resize_columns(rows: Bytes, begin: int, taps: Taps, out: Pixels) -> None:
    """The vertical pass; row 0 of ``rows``, (h, 4 * w) bytes, is number ``begin`` to the taps."""
    sums = np.empty(rows.shape[1], np.int32)
    _combine(rows, begin, taps, rows.shape[1], sums, out.view(np.uint8))


@njit(nogil=True, cache=True)
def _split(pixels: Pixels, planes: Bytes) -> None:
    flat, r, g, b = pixels.reshape(-1), planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1)
    for i in range(flat.size):
        r[i] = np.uint8(flat[i])
        g[i] = np.uint8(flat[i] >> np.uint32(8))
        b[i] = np.uint8(flat[i] >> np.uint32(16))


@njit(nogil=True, cache=True)
def _is_vertical_first(box: NDArray[np.float64], edge: NDArray[np.int64], size: int) -> bool:
    """Pillow's rule since version 13 (python-pillow/Pillow#9549): when the height shrinks by much more."""
    height, width = round(edge[2] * size / box[2]), round(edge[3] * size / box[3])
    return edge[2] > height and edge[2] - height > 2 * (edge[3] - width)


@njit(nogil=True, cache=True)
def resample(
    image: Pixels,
    top: int,
    left: int,
    box: NDArray[np.float64],
    edge: NDArray[np.int64],
    flip: bool,
    cubic: bool,
    out: Bytes,
) -> None:
    """Cut ``box`` out of an image, resize it to ``out`` (3, size, size) uint8 and mirror it if ``flip``.

    ``image`` holds the source image from (``top``, ``left``) on, at least as far as the filter reads. ``box`` and
    ``edge`` are those of a `ViewPlan`: pixels outside ``edge`` have no influence.
    """
    size = out.shape[1]
    vertical = find_taps(box[0] - edge[0], box[2], edge[2], size, False, cubic)
    horizontal = find_taps(box[1] - edge[1], box[3], edge[3], size, flip, cubic)
    y, end = _span(vertical)
    x, right = _span(horizontal)
    rows, columns = edge[0] - top, edge[1] - left
    source = image[rows + y : rows + end, columns + x : columns + right]
    resized = np.empty((size, size), np.uint32)
    if _is_vertical_first(box, edge, size):
        between = np.empty((size, right - x), np.uint32)
        _resize_columns(source.copy().view(np.uint8), y, vertical, between)
        _resize_rows(between, x, horizontal, resized)
    else:
        between = np.empty((end - y, size), np.uint32)
        _resize_rows(source, x, horizontal, between)
        _resize_columns(between.view(np.uint8), y, vertical, resized)
    _split(resized, out)
