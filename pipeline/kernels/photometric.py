"""Photometric operations on one view, in the arithmetic of torchvision's functional operations on Pillow images.

A view is three planes, (3, size, size) uint8, changed in place. Every operation rounds to 8 bits as Pillow does, so a
chain of them gives the same pixels in the same order of operations.
"""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.plan import BRIGHTNESS, CONTRAST, SATURATION

Planes = NDArray[np.uint8]  # (3, size, size)
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_BLOCK = 8  # rows blurred together: they fit the first-level cache with those around them


@njit(nogil=True, cache=True)
def _clip(value: np.float32) -> np.uint8:
    """To 8 bits, rounded towards zero."""
    clipped: Any = min(max(value, np.float32(0)), np.float32(255))
    return np.uint8(np.int32(clipped))


@njit(nogil=True, cache=True)
def _grey(r: int, g: int, b: int) -> np.int32:
    """ITU-R 601 luma in Pillow's 16-bit fixed point."""
    total = np.int32(r) * np.int32(19595) + np.int32(g) * np.int32(38470) + np.int32(b) * np.int32(7471)
    return np.int32((total + np.int32(0x8000)) >> np.int32(16))


@njit(nogil=True, cache=True)
def blend(view: Planes, base: int, factor: float) -> None:
    """Away from (factor above 1) or towards a grey value: black for brightness."""
    flat, f, b = view.reshape(-1), np.float32(factor), np.float32(base)
    for i in range(flat.size):
        flat[i] = _clip(b + f * (np.float32(flat[i]) - b))


@njit(nogil=True, cache=True)
def contrast(view: Planes, factor: float) -> None:
    """About the image's own mean grey value, rounded."""
    total = np.int64(0)
    for y in range(view.shape[1]):
        r, g, b, row = view[0, y], view[1, y], view[2, y], np.int32(0)
        for x in range(len(r)):
            row += _grey(r[x], g[x], b[x])  # in 32 bits, which vectorises better than 64
        total += row
    blend(view, int(total / view[0].size + 0.5), factor)


@njit(nogil=True, cache=True)
def saturation(view: Planes, factor: float) -> None:
    r, g, b, f = view[0].reshape(-1), view[1].reshape(-1), view[2].reshape(-1), np.float32(factor)
    for i in range(r.size):
        grey = np.float32(_grey(r[i], g[i], b[i]))
        r[i] = _clip(grey + f * (np.float32(r[i]) - grey))
        g[i] = _clip(grey + f * (np.float32(g[i]) - grey))
        b[i] = _clip(grey + f * (np.float32(b[i]) - grey))


@njit(nogil=True, cache=True, inline="always")
def _level(hue6: np.float32, phase: np.float32, value: np.float32, chroma: np.float32) -> np.uint8:
    """One channel of an HSV colour; ``hue6`` and ``phase`` in sixths of a turn times 255, ``chroma`` = value * s."""
    angle = hue6 + phase
    angle = angle - np.float32(1530) if angle >= np.float32(1530) else angle
    below = min(max(min(angle, np.float32(1020) - angle), np.float32(0)), np.float32(255))
    return np.uint8(np.int32(value + np.float32(0.5) - chroma * below * np.float32(1 / 65025)))


@njit(nogil=True, cache=True, error_model="numpy")
def hue(view: Planes, shift: float) -> None:
    """Through 8-bit HSV; ``shift`` in turns, truncated to 1/255. A shift of 0, drawn only if hue is off, does nothing.

    Free of branches, and in single precision, which gives Pillow's result for every colour: its hue is
    ``base + x`` or ``base - x`` sixths of a turn, x being the middle channel's distance from the largest.
    """
    if shift == 0:
        return
    red, green, blue = view[0].reshape(-1), view[1].reshape(-1), view[2].reshape(-1)
    one, step = np.float32(1), np.float32(int(shift * 255) & 255)
    for i in range(red.size):
        r, g, b = np.float32(red[i]), np.float32(green[i]), np.float32(blue[i])
        value, low = max(r, g, b), min(r, g, b)
        spread = value - low
        x = (value - (r + g + b - value - low)) / max(spread, one)
        base, x = (np.float32(3), x) if low == r else (np.float32(5), -x)
        if value == g:
            base, x = (np.float32(3), -abs(x)) if low == r else (one, abs(x))
        if value == r:
            base, x = (-one, abs(x)) if low == g else (one, -abs(x))
        turns = (base + x) / np.float32(6)
        turns = turns + one if turns < np.float32(0) else turns
        shifted = np.float32(np.int32(turns * np.float32(255))) + step
        shifted = shifted - np.float32(256) if shifted >= np.float32(256) else shifted
        saturated = np.float32(np.int32(spread / max(value, one) * np.float32(255)))
        hue6, chroma = shifted * np.float32(6), value * saturated
        red[i] = _level(hue6, np.float32(1275), value, chroma)
        green[i] = _level(hue6, np.float32(765), value, chroma)
        blue[i] = _level(hue6, np.float32(255), value, chroma)


@njit(nogil=True, cache=True)
def grey(view: Planes) -> None:
    """Only in the first plane, which then stands for all."""
    r, g, b = view[0].reshape(-1), view[1].reshape(-1), view[2].reshape(-1)
    for i in range(r.size):
        r[i] = np.uint8(_grey(r[i], g[i], b[i]))


@njit(nogil=True, cache=True)
def solarize(view: Planes) -> None:
    """Inverts values of 128 and above."""
    flat = view.reshape(-1)
    for i in range(flat.size):
        flat[i] = flat[i] if flat[i] < 128 else np.uint8(255 - flat[i])


@njit(nogil=True, cache=True)
def _gaussian(sigma: float, radius: int) -> Floats:
    """Weights (radius + 1,) of the centre and of one side, normalised over both sides."""
    weights = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
    return (weights / (2 * weights.sum() - 1)).astype(np.float32)


@njit(nogil=True, cache=True, fastmath=True)
def _convolve(source: Floats, stride: int, weights: Floats, out: Floats) -> None:
    """``out`` (n,) = the symmetric filter on ``source`` (n + 2 * radius * stride,), its taps ``stride`` apart."""
    n, radius = len(out), len(weights) - 1
    # Slices: Numba vectorises a loop over ``source[offset + i]`` only if it can tell that no index is negative.
    centre, last = source[radius * stride :], source[2 * radius * stride :]
    a, b, u, v = source[(radius - 1) * stride :], source[(radius + 1) * stride :], weights[0], weights[1]
    for i in range(n):
        out[i] = u * centre[i] + v * (a[i] + b[i])
    for k in range(2, radius, 2):
        a, b, u = source[(radius - k) * stride :], source[(radius + k) * stride :], weights[k]
        c, d, v = source[(radius - k - 1) * stride :], source[(radius + k + 1) * stride :], weights[k + 1]
        for i in range(n):
            out[i] += u * (a[i] + b[i]) + v * (c[i] + d[i])
    if radius % 2 == 0:
        u = weights[radius]
        for i in range(n):
            out[i] += u * (source[i] + last[i])


@njit(nogil=True, cache=True)
def _load_row(row: Bytes, radius: int, out: Floats) -> None:
    """A row with ``radius`` pixels reflected at either end."""
    n, centre = len(row), out[radius:]  # a slice: see `_convolve`
    for x in range(n):
        centre[x] = row[x]
    for x in range(1, radius + 1):
        out[radius - x], out[radius + n - 1 + x] = row[x], row[n - 1 - x]


@njit(nogil=True, cache=True)
def _blur_plane(plane: Bytes, weights: Floats, rows: Floats) -> None:
    """``rows`` (size + 2 * radius + _BLOCK, size + 2 * radius) is scratch.

    Blocks of several rows are filtered as one long one; what the ends of rows mix is never used.
    """
    size, radius, pitch = len(plane), len(weights) - 1, rows.shape[1]
    block = np.empty((_BLOCK, pitch), np.float32)
    flat, flat_rows = block.reshape(-1), rows.reshape(-1)
    for y in range(0, size, _BLOCK):
        count = min(_BLOCK, size - y)
        for i in range(count):
            _load_row(plane[y + i], radius, block[i])
        n, start = count * pitch, (radius + y) * pitch
        _convolve(flat[:n], 1, weights, flat_rows[start : start + n - 2 * radius])
    for y in range(1, radius + 1):
        rows[radius - y], rows[radius + size - 1 + y] = rows[radius + y], rows[radius + size - 1 - y]
    for y in range(0, size, _BLOCK):
        count = min(_BLOCK, size - y)
        _convolve(flat_rows[y * pitch :], pitch, weights, flat[: count * pitch])
        for i in range(count):
            for x in range(size):
                plane[y + i, x] = np.uint8(np.int32(block[i, x] + np.float32(0.5)))


@njit(nogil=True, cache=True)
def blur(view: Planes, sigma: float, kernel: int) -> None:
    """Gaussian of odd width ``kernel``, borders reflected, the two directions one after the other.

    What lies beyond four ``sigma`` is left out: at most 1/15000 of the weight, so 1/60 of a grey level. torchvision
    convolves with the two-dimensional kernel in float32; the result differs where that rounds the other way.
    """
    radius = min(kernel // 2, int(4 * sigma + 0.5))
    if radius == 0:
        return
    size = view.shape[2]
    weights = _gaussian(sigma, radius)
    rows = np.empty((size + 2 * radius + _BLOCK, size + 2 * radius), np.float32)
    for plane in view:
        _blur_plane(plane, weights, rows)


@njit(nogil=True, cache=True)
def interleave(view: Planes, out: Bytes) -> None:
    """Planes (3, size, size), or one for all, into pixels (size, size, 3)."""
    r, g, b, flat = view[0].reshape(-1), view[len(view) // 2].reshape(-1), view[-1].reshape(-1), out.reshape(-1)
    for i in range(r.size):
        flat[3 * i], flat[3 * i + 1], flat[3 * i + 2] = r[i], g[i], b[i]


@njit(nogil=True, cache=True)
def _jitter(view: Planes, order: NDArray[np.int8], factors: Floats) -> None:
    for operation in order:
        factor = factors[operation]
        if operation == BRIGHTNESS:
            blend(view, 0, factor)
        elif operation == CONTRAST:
            contrast(view, factor)
        elif operation == SATURATION:
            saturation(view, factor)
        else:
            hue(view, factor)


@njit(nogil=True, cache=True)
def adjust(
    view: Planes,
    jittered: bool,
    order: NDArray[np.int8],
    factors: Floats,
    greyed: bool,
    sigma: float,
    kernel: int,
    solarized: bool,
    out: Bytes,
) -> None:
    """All photometric operations of a view, which is used up, in their sequence, into ``out`` (size, size, 3)."""
    if jittered:
        _jitter(view, order, factors)
    if greyed:
        grey(view)
    planes = view[:1] if greyed else view  # one stands for all
    if sigma > 0:
        blur(planes, sigma, kernel)
    if solarized:
        solarize(planes)
    interleave(planes, out)
