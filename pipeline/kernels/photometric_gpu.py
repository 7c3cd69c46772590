"""Photometric operations on a GPU by Triton, in the arithmetic of torchvision's functional operations on Pillow images.

The operations of a view are one pass over its pixels, rounded to 8 bits after each as Pillow does; a second pass before
it sums up the grey values that contrast turns on. Blur is two more passes over the views that are blurred.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton gives its kernels their types when it compiles them.

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from pipeline.kernels.resample_gpu import EXACT
from pipeline.plan import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewPlan
from pipeline.transfer import upload

_BLOCK = 1024
_BRIGHTNESS, _CONTRAST = tl.constexpr(BRIGHTNESS), tl.constexpr(CONTRAST)
_SATURATION, _HUE = tl.constexpr(SATURATION), tl.constexpr(HUE)
_NONE = 4  # no operation


def apply_photometric(views: torch.Tensor, plan: ViewPlan) -> None:
    """Jitter, grey, blur and solarize on views (n, size, size, 3) uint8, in place."""
    _change_colours(views, plan)
    if (blurred := np.flatnonzero(plan.sigma)).size:
        _blur(views, blurred, plan)
    if (chosen := np.flatnonzero(plan.solarize)).size:
        rows = upload(chosen, views.device)
        views[rows] = torch.where(views[rows] < 128, views[rows], 255 - views[rows])


def _change_colours(views: torch.Tensor, plan: ViewPlan) -> None:
    device, num_pixels = views.device, plan.spec.size**2
    # A hue of 0 is off, as in torchvision's ColorJitter: the way through HSV and back is not exact.
    without = ~plan.jitter[:, None] | (plan.order == HUE) & (plan.factors[:, HUE:] == 0)
    order = np.where(without, _NONE, plan.order).astype(np.int32)
    if not (plan.jitter | plan.grey).any():
        return
    before_contrast = np.where(np.cumsum(order == CONTRAST, axis=1) == 0, order, _NONE)
    factors = upload(plan.factors, device)
    sums = torch.zeros(len(views), dtype=torch.int32, device=device)
    grid = len(views), triton.cdiv(num_pixels, _BLOCK)
    _sum_grey[grid](views, upload(before_contrast, device), factors, sums, num_pixels, _BLOCK, **EXACT)
    grey = upload(plan.grey, device)
    _jitter_and_grey[grid](views, upload(order, device), factors, sums, grey, num_pixels, _BLOCK, **EXACT)


def _blur(views: torch.Tensor, blurred: NDArray[np.int64], plan: ViewPlan) -> None:
    """torchvision's Gaussian, borders reflected, as two passes in float32; only the result is rounded."""
    size, radius = plan.spec.size, plan.spec.kernel // 2
    offsets = np.arange(-radius, radius + 1, dtype=np.float32)
    weights = np.exp(-0.5 * (offsets / plan.sigma[blurred, None]) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)
    rows, taps = upload(blurred, views.device), upload(weights, views.device)
    passed = torch.empty((len(blurred), size, size, 3), dtype=torch.float32, device=views.device)
    grid = len(blurred), triton.cdiv(size * size * 3, _BLOCK)
    _blur_rows[grid](views, rows, taps, passed, size, radius, _BLOCK, **EXACT)
    _blur_columns[grid](passed, rows, taps, views, size, radius, _BLOCK, **EXACT)


@triton.jit
def _sum_grey(views, order, factors, sums, num_pixels, block: tl.constexpr):
    """``sums`` (n,) += the grey values of the views as contrast finds them; ``order`` holds what precedes it."""
    image = tl.program_id(0)
    pixel = tl.program_id(1) * block + tl.arange(0, block)
    inside = pixel < num_pixels
    r, g, b = _load(views, image, pixel, num_pixels, inside)
    r, g, b = _jitter(r, g, b, order + image * 4, factors + image * 4, 0)
    tl.atomic_add(sums + image, tl.sum(tl.where(inside, _luma(r, g, b), 0)))


@triton.jit
def _jitter_and_grey(views, order, factors, sums, grey, num_pixels, block: tl.constexpr):
    image = tl.program_id(0)
    pixel = tl.program_id(1) * block + tl.arange(0, block)
    inside = pixel < num_pixels
    r, g, b = _load(views, image, pixel, num_pixels, inside)
    mean = (tl.load(sums + image).to(tl.float64) / num_pixels + 0.5).to(tl.int32)
    r, g, b = _jitter(r, g, b, order + image * 4, factors + image * 4, mean)
    if tl.load(grey + image) != 0:
        r = _luma(r, g, b)
        g = r
        b = r
    target = views + (image.to(tl.int64) * num_pixels + pixel) * 3
    tl.store(target, r.to(tl.uint8), mask=inside)
    tl.store(target + 1, g.to(tl.uint8), mask=inside)
    tl.store(target + 2, b.to(tl.uint8), mask=inside)


@triton.jit
def _load(views, image, pixel, num_pixels, inside):
    source = views + (image.to(tl.int64) * num_pixels + pixel) * 3
    r = tl.load(source, mask=inside, other=0).to(tl.int32)
    g = tl.load(source + 1, mask=inside, other=0).to(tl.int32)
    b = tl.load(source + 2, mask=inside, other=0).to(tl.int32)
    return r, g, b


@triton.jit
def _jitter(r, g, b, order, factors, mean):
    """The operations that ``order`` (4,) names, one after the other; ``mean`` is the grey that contrast turns on."""
    for k in range(4):
        operation = tl.load(order + k)
        if operation == _BRIGHTNESS:
            factor = tl.load(factors + _BRIGHTNESS)
            r, g, b = _blend(r, 0, factor), _blend(g, 0, factor), _blend(b, 0, factor)
        elif operation == _CONTRAST:
            factor = tl.load(factors + _CONTRAST)
            r, g, b = _blend(r, mean, factor), _blend(g, mean, factor), _blend(b, mean, factor)
        elif operation == _SATURATION:
            factor = tl.load(factors + _SATURATION)
            luma = _luma(r, g, b)
            r, g, b = _blend(r, luma, factor), _blend(g, luma, factor), _blend(b, luma, factor)
        elif operation == _HUE:
            r, g, b = _turn_hue(r, g, b, tl.load(factors + _HUE))
    return r, g, b


@triton.jit
def _blend(value, base, factor):
    """Away from (factor above 1) or towards ``base``; clipped, rounded towards zero."""
    base = (value * 0 + base).to(tl.float32)
    blended = base + factor * (value.to(tl.float32) - base)
    return tl.minimum(tl.maximum(blended, 0.0), 255.0).to(tl.int32)


@triton.jit
def _luma(r, g, b):
    """ITU-R 601 in Pillow's 16-bit fixed point."""
    return (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16


@triton.jit
def _turn_hue(r, g, b, shift):
    """`pipeline.kernels.photometric.hue`: Pillow's 8-bit HSV and back; ``shift`` in turns, truncated to 1/255."""
    r, g, b = r.to(tl.float32), g.to(tl.float32), b.to(tl.float32)
    value, low = tl.maximum(r, tl.maximum(g, b)), tl.minimum(r, tl.minimum(g, b))
    spread = value - low
    x = tl.div_rn(value - (r + g + b - value - low), tl.maximum(spread, 1.0))
    sixths = tl.where(low == r, 3.0 + x, 5.0 - x)
    sixths = tl.where(value == g, tl.where(low == r, 3.0 - x, 1.0 + x), sixths)
    sixths = tl.where(value == r, tl.where(low == g, -1.0 + x, 1.0 - x), sixths)
    turns = tl.div_rn(sixths, tl.full(sixths.shape, 6.0, tl.float32))
    turns = tl.where(turns < 0.0, turns + 1.0, turns)
    hue = ((turns * 255.0).to(tl.int32) + (shift.to(tl.float64) * 255.0).to(tl.int32)) & 255
    saturation = (tl.div_rn(spread, tl.maximum(value, 1.0)) * 255.0).to(tl.int32)
    chroma = value * saturation.to(tl.float32)
    return _level(hue, 1275, value, chroma), _level(hue, 765, value, chroma), _level(hue, 255, value, chroma)


@triton.jit
def _level(hue, phase: tl.constexpr, value, chroma):
    """One channel of an HSV colour; ``phase`` in sixths of a turn times 255, ``chroma`` is value times saturation."""
    angle = hue * 6 + phase
    angle = tl.where(angle >= 1530, angle - 1530, angle)
    below = tl.minimum(tl.maximum(tl.minimum(angle, 1020 - angle), 0), 255).to(tl.float32)
    return (value + 0.5 - chroma * below * (1 / 65025)).to(tl.int32)


@triton.jit
def _blur_rows(views, rows, weights, passed, size, radius, block: tl.constexpr):
    """From ``views[rows]`` uint8 to ``passed`` float32."""
    image = tl.program_id(0)
    value = tl.program_id(1) * block + tl.arange(0, block)
    inside = value < size * size * 3
    channel, x, y = value % 3, value // 3 % size, value // (3 * size)
    source = views + tl.load(rows + image) * size * size * 3 + y * size * 3 + channel
    total = tl.zeros((block,), tl.float32)
    for k in range(2 * radius + 1):
        pixel = tl.load(source + _reflect(x + k - radius, size) * 3, mask=inside, other=0)
        total += pixel.to(tl.float32) * tl.load(weights + image * (2 * radius + 1) + k)
    tl.store(passed + image.to(tl.int64) * size * size * 3 + value, total, mask=inside)


@triton.jit
def _blur_columns(passed, rows, weights, views, size, radius, block: tl.constexpr):
    """From ``passed`` float32 to ``views[rows]`` uint8."""
    image = tl.program_id(0)
    value = tl.program_id(1) * block + tl.arange(0, block)
    inside = value < size * size * 3
    in_row, y = value % (3 * size), value // (3 * size)
    source = passed + image.to(tl.int64) * size * size * 3 + in_row
    total = tl.zeros((block,), tl.float32)
    for k in range(2 * radius + 1):
        pixel = tl.load(source + _reflect(y + k - radius, size) * size * 3, mask=inside, other=0)
        total += pixel * tl.load(weights + image * (2 * radius + 1) + k)
    tl.store(views + tl.load(rows + image) * size * size * 3 + value, (total + 0.5).to(tl.uint8), mask=inside)


@triton.jit
def _reflect(position, size):
    """Positions outside ``[0, size)`` mirrored about the border pixels."""
    position = tl.abs(position)
    return tl.where(position < size, position, 2 * (size - 1) - position)
