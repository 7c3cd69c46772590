"""Photometric operations on one view, in the arithmetic of torchvision's functional operations on Pillow images.

A view is three planes, (3, size, size) uint8, changed in place. Every operation rounds to 8 bits as Pillow does, so a
chain of them gives the same pixels in the same order of operations.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.plan import BRIGHTNESS, CONTRAST, SATURATION

Planes = NDArray[np.uint8]  # (3, size, size)
Plane = NDArray[np.uint8]


@njit(nogil=True, cache=True)
def _clip(value: float) -> np.uint8:
    """To 8 bits, rounded towards zero."""
    return np.uint8(np.int32(min(max(value, np.float32(0)), np.float32(255))))


@njit(nogil=True, cache=True)
def _grey(r: int, g: int, b: int) -> np.int32:
    """ITU-R 601 luma in Pillow's 16-bit fixed point."""
    total = np.int32(r) * np.int32(19595) + np.int32(g) * np.int32(38470) + np.int32(b) * np.int32(7471)
    return np.int32((total + np.int32(0x8000)) >> np.int32(16))


@njit(nogil=True, cache=True)
def _blend(view: Planes, base: int, factor: float) -> None:
    """Away from (factor above 1) or towards a grey value."""
    flat, f, b = view.reshape(-1), np.float32(factor), np.float32(base)
    for i in range(flat.size):
        flat[i] = _clip(b + f * (np.float32(flat[i]) - b))


@njit(nogil=True, cache=True)
def brightness(view: Planes, factor: float) -> None:
    _blend(view, 0, factor)


@njit(nogil=True, cache=True)
def contrast(view: Planes, factor: float) -> None:
    """About the image's own mean grey value, rounded."""
    r, g, b = view[0].reshape(-1), view[1].reshape(-1), view[2].reshape(-1)
    total = 0
    for i in range(r.size):
        total += _grey(r[i], g[i], b[i])
    _blend(view, int(total / r.size + 0.5), factor)


@njit(nogil=True, cache=True)
def saturation(view: Planes, factor: float) -> None:
    r, g, b, f = view[0].reshape(-1), view[1].reshape(-1), view[2].reshape(-1), np.float32(factor)
    for i in range(r.size):
        grey = np.float32(_grey(r[i], g[i], b[i]))
        r[i] = _clip(grey + f * (np.float32(r[i]) - grey))
        g[i] = _clip(grey + f * (np.float32(g[i]) - grey))
        b[i] = _clip(grey + f * (np.float32(b[i]) - grey))


@njit(nogil=True, cache=True)
def hue(view: Planes, shift: float) -> None:
    """Through 8-bit HSV; ``shift`` in turns, truncated to 1/255."""
    r, g, b = view[0].reshape(-1), view[1].reshape(-1), view[2].reshape(-1)
    step = np.int32(int(shift * 255)) & np.int32(255)
    for i in range(r.size):
        red, green, blue = np.int32(r[i]), np.int32(g[i]), np.int32(b[i])
        top, bottom = max(red, green, blue), min(red, green, blue)
        spread = top - bottom
        if spread == 0:
            continue
        inverse = np.float32(spread)
        s = np.int32(np.float64(inverse / np.float32(top)) * 255.0)
        rc, gc, bc = (
            np.float32(top - red) / inverse,
            np.float32(top - green) / inverse,
            np.float32(top - blue) / inverse,
        )
        if red == top:
            h = np.float32(bc - gc)
        elif green == top:
            h = np.float32(2.0 + np.float64(rc) - np.float64(bc))
        else:
            h = np.float32(4.0 + np.float64(gc) - np.float64(rc))
        h = np.float32((np.float64(h) / 6.0 + 1.0) % 1.0)
        turned = (np.int32(np.float64(h) * 255.0) + step) & np.int32(255)
        if s == 0:
            r[i] = g[i] = b[i] = top
            continue
        sector = (turned * 6) // 255
        f = np.float32(np.float64(turned) * 6.0 / 255.0 - sector)
        fs = np.float32(s / 255.0)
        p = np.uint8(np.float64(top) * (1.0 - fs) + 0.5)
        q = np.uint8(np.float64(top) * (1.0 - np.float64(np.float32(fs * f))) + 0.5)
        t = np.uint8(np.float64(top) * (1.0 - fs * (1.0 - np.float64(f))) + 0.5)
        sector = sector % 6
        if sector == 0:
            r[i], g[i], b[i] = top, t, p
        elif sector == 1:
            r[i], g[i], b[i] = q, top, p
        elif sector == 2:
            r[i], g[i], b[i] = p, top, t
        elif sector == 3:
            r[i], g[i], b[i] = p, q, top
        elif sector == 4:
            r[i], g[i], b[i] = t, p, top
        else:
            r[i], g[i], b[i] = top, p, q


@njit(nogil=True, cache=True)
def grey(view: Planes) -> None:
    r, g, b = view[0].reshape(-1), view[1].reshape(-1), view[2].reshape(-1)
    for i in range(r.size):
        r[i] = g[i] = b[i] = np.uint8(_grey(r[i], g[i], b[i]))


@njit(nogil=True, cache=True)
def solarize(view: Planes) -> None:
    """Inverts values of 128 and above."""
    flat = view.reshape(-1)
    for i in range(flat.size):
        flat[i] = flat[i] if flat[i] < 128 else np.uint8(255 - flat[i])


@njit(nogil=True, cache=True)
def _gaussian(sigma: float, radius: int) -> NDArray[np.float32]:
    """Weights (radius + 1,) of the centre and of one side, normalised over both sides."""
    weights = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
    return (weights / (2 * weights.sum() - 1)).astype(np.float32)


@njit(nogil=True, cache=True, fastmath=True)
def _convolve(source: NDArray[np.float32], stride: int, weights: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """``out`` (n,) = the symmetric filter on ``source`` (n + 2 * radius * stride,), its taps ``stride`` apart."""
    n, centre = len(out), (len(weights) - 1) * stride
    for i in range(n):
        out[i] = weights[0] * source[centre + i]
    for k in range(1, len(weights)):
        below, above, weight = source[centre - k * stride :], source[centre + k * stride :], weights[k]
        for i in range(n):
            out[i] += weight * (below[i] + above[i])


@njit(nogil=True, cache=True)
def blur(view: Planes, sigma: float, kernel: int) -> None:
    """Gaussian of odd width ``kernel``, borders reflected; taps below 1/3000 of the centre's are left out."""
    size = view.shape[2]
    radius = min(kernel // 2, int(4 * sigma + 0.5))
    if radius == 0:
        return
    weights = _gaussian(sigma, radius)
    padded, sums = np.empty(size + 2 * radius, np.float32), np.empty(size, np.float32)
    rows = np.empty((size + 2 * radius, size), np.float32)
    for channel in range(3):
        plane = view[channel]
        for y in range(size):
            for x in range(size):
                padded[radius + x] = plane[y, x]
            for x in range(1, radius + 1):
                padded[radius - x], padded[radius + size - 1 + x] = plane[y, x], plane[y, size - 1 - x]
            _convolve(padded, 1, weights, rows[radius + y])
        for y in range(1, radius + 1):
            rows[radius - y], rows[radius + size - 1 + y] = rows[radius + y], rows[radius + size - 1 - y]
        for y in range(size):
            _convolve(rows[y : y + 2 * radius + 1].reshape(-1), size, weights, sums)
            for x in range(size):
                plane[y, x] = np.uint8(sums[x] + np.float32(0.5))


@njit(nogil=True, cache=True)
def interleave(view: Planes, out: NDArray[np.uint8]) -> None:
    """Planes (3, size, size) into pixels (size, size, 3)."""
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            out[y, x, 0], out[y, x, 1], out[y, x, 2] = view[0, y, x], view[1, y, x], view[2, y, x]


@njit(nogil=True, cache=True)
def _jitter(view: Planes, order: NDArray[np.int8], factors: NDArray[np.float32]) -> None:
    for operation in order:
        factor = factors[operation]
        if operation == BRIGHTNESS:
            brightness(view, factor)
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
    factors: NDArray[np.float32],
    greyed: bool,
    sigma: float,
    kernel: int,
    solarized: bool,
    out: NDArray[np.uint8],
) -> None:
    """All photometric operations of a view, which is used up, in their sequence, into ``out`` (size, size, 3)."""
    if jittered:
        _jitter(view, order, factors)
    if greyed:
        grey(view)
    if sigma > 0:
        blur(view, sigma, kernel)
    if solarized:
        solarize(view)
    interleave(view, out)
