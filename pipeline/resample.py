"""Geometry: crop, antialiased bilinear resize and horizontal flip, in Pillow's own integer arithmetic.

Pillow resizes 8-bit images by a horizontal and then a vertical pass, both with 22-bit fixed-point weights and both
rounded to 8 bits (`ImagingResample`), so the same arithmetic gives the same pixels. A decoded image is (h, w) uint32,
one RGBX pixel each. Both passes are the same vectorised combination of long rows; for the horizontal one, strips of the
image are transposed on the way in and out.
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

Pixels = NDArray[np.uint32]  # (h, w) RGBX
Bytes = NDArray[np.uint8]
Int32s = NDArray[np.int32]

_PRECISION = 22  # bits of a weight's fraction; 8 bits of pixel and 2 of headroom fill 32
_HALF = np.int32(1 << (_PRECISION - 1))
_SHIFT = np.int32(_PRECISION)
_STRIP = 32  # rows transposed at a time: as many as keep the strip of a 500 px wide image near the first-level cache


class Taps(NamedTuple):
    """Which source pixels, with which weights, make up each of n output pixels along one axis.

    first (n,) int32: the first source pixel; length (n,) int32: how many; weights (n, most) int32, in units of 2**-22
    """

    first: Int32s
    length: Int32s
    weights: Int32s


@njit(nogil=True, cache=True)
def find_taps(start: float, extent: float, limit: int, size: int, reverse: bool) -> Taps:
    """Taps for resizing ``[start, start + extent)`` of an axis of ``limit`` pixels to ``size`` pixels.

    The bilinear filter widens with the scale when it shrinks the image (antialiasing); ``reverse`` mirrors the output.
    """
    scale = extent / size
    support = max(scale, 1.0)
    first, length = np.empty(size, np.int32), np.empty(size, np.int32)
    weights = np.zeros((size, int(np.ceil(support)) * 2 + 1), np.int32)
    raw = np.empty(weights.shape[1], np.float64)
    for i in range(size):
        centre = start + (i + 0.5) * scale
        low = max(int(centre - support + 0.5), 0)
        high = min(int(centre + support + 0.5), limit)
        total = 0.0
        for k in range(high - low):
            raw[k] = max(1.0 - abs((low + k - centre + 0.5) * (1.0 / support)), 0.0)
            total += raw[k]
        out = size - 1 - i if reverse else i
        first[out], length[out] = low, high - low
        for k in range(high - low):
            weights[out, k] = int(0.5 + raw[k] / total * (1 << _PRECISION))
    return Taps(first, length, weights)


@njit(nogil=True, cache=True)
def _span(taps: Taps) -> tuple[int, int]:
    """The source pixels [first, end) that taps read."""
    ends = taps.first[0] + taps.length[0], taps.first[-1] + taps.length[-1]
    return min(taps.first[0], taps.first[-1]), max(ends)


@njit(nogil=True, cache=True)
def _combine(rows: Bytes, first: int, weights: Int32s, sums: Int32s) -> None:
    """``sums`` = the weighted sum of the rows from ``first`` on, one for each weight, plus one half."""
    n = len(sums)
    row, weight = rows[first], weights[0]
    for i in range(n):
        sums[i] = np.int32(np.int32(row[i]) * weight) + _HALF
    for k in range(1, len(weights)):
        row, weight = rows[first + k], weights[k]
        for i in range(n):
            sums[i] += np.int32(np.int32(row[i]) * weight)


@njit(nogil=True, cache=True)
def _resize_rows(image: Pixels, begin: int, taps: Taps, out: Pixels) -> None:
    """The horizontal pass; column 0 of ``image`` is number ``begin`` to the taps."""
    first, end = _span(taps)
    size = len(taps.first)
    strip = np.empty((end - first, _STRIP), np.uint32)
    resized = np.empty((size, _STRIP), np.uint32)
    sums = np.empty(4 * _STRIP, np.int32)
    strip_bytes, resized_bytes = strip.view(np.uint8), resized.view(np.uint8)
    for y in range(0, len(image), _STRIP):
        for x in range(end - first):
            for i in range(_STRIP):
                strip[x, i] = image[min(y + i, len(image) - 1), first - begin + x]
        for x in range(size):
            _combine(strip_bytes, taps.first[x] - first, taps.weights[x, : taps.length[x]], sums)
            for i in range(4 * _STRIP):
                resized_bytes[x, i] = sums[i] >> _SHIFT
        for i in range(min(_STRIP, len(image) - y)):
            for x in range(size):
                out[y + i, x] = resized[x, i]


@njit(nogil=True, cache=True)
def _resize_columns(image: Pixels, begin: int, taps: Taps, out: Pixels) -> None:
    """The vertical pass; row 0 of ``image`` is number ``begin`` to the taps."""
    rows, out_rows = _bytes(image), _bytes(out)
    sums = np.empty(rows.shape[1], np.int32)
    for y in range(len(taps.first)):
        _combine(rows, taps.first[y] - begin, taps.weights[y, : taps.length[y]], sums)
        for i in range(len(sums)):
            out_rows[y, i] = sums[i] >> _SHIFT


@njit(nogil=True, cache=True)
def _bytes(pixels: Pixels) -> Bytes:
    """Rows of bytes: (h, 4 * w)."""
    return pixels.view(np.uint8)


@njit(nogil=True, cache=True)
def _split(pixels: Pixels, planes: Bytes) -> None:
    for y in range(pixels.shape[0]):
        for x in range(pixels.shape[1]):
            planes[0, y, x] = np.uint8(pixels[y, x])
            planes[1, y, x] = np.uint8(pixels[y, x] >> np.uint32(8))
            planes[2, y, x] = np.uint8(pixels[y, x] >> np.uint32(16))


@njit(nogil=True, cache=True)
def _is_vertical_first(box: NDArray[np.float64], edge: NDArray[np.int64], size: int) -> bool:
    """Pillow's rule since version 13 (python-pillow/Pillow#9549): when the height shrinks by much more."""
    height, width = round(edge[2] * size / box[2]), round(edge[3] * size / box[3])
    return edge[2] > height and edge[2] - height > 2 * (edge[3] - width)


@njit(nogil=True, cache=True)
def resample(
    image: Pixels, top: int, left: int, box: NDArray[np.float64], edge: NDArray[np.int64], flip: bool, out: Bytes
) -> None:
    """Cut ``box`` out of an image, resize it to ``out`` (3, size, size) uint8 and mirror it if ``flip``.

    ``image`` holds the source image from (``top``, ``left``) on, at least as far as the filter reads. ``box`` and
    ``edge`` are those of a `ViewPlan`: pixels outside ``edge`` have no influence.
    """
    size = out.shape[1]
    vertical = find_taps(box[0] - edge[0], box[2], edge[2], size, False)
    horizontal = find_taps(box[1] - edge[1], box[3], edge[3], size, flip)
    y, end = _span(vertical)
    x, right = _span(horizontal)
    rows, columns = edge[0] - top, edge[1] - left
    source = image[rows + y : rows + end, columns + x : columns + right]
    resized = np.empty((size, size), np.uint32)
    if _is_vertical_first(box, edge, size):
        between = np.empty((size, right - x), np.uint32)
        _resize_columns(np.ascontiguousarray(source), y, vertical, between)
        _resize_rows(between, x, horizontal, resized)
    else:
        between = np.empty((end - y, size), np.uint32)
        _resize_rows(source, x, horizontal, between)
        _resize_columns(between, y, vertical, resized)
    _split(resized, out)
