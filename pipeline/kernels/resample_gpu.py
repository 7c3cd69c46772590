"""Geometry on a GPU: crop, antialiased resize and horizontal flip, in Pillow's integer arithmetic, by Triton.

Pillow resizes 8-bit images along one axis and then along the other, both with 22-bit fixed-point weights and both
rounded to 8 bits (`ImagingResample`). DALI's resize is close (mean difference 0.17 of 255), but repeats border pixels
where Pillow shortens the filter, which shows when an image shrinks to a tenth.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton gives its kernels their types when it compiles them.

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from pipeline.plan import ViewPlan
from pipeline.transfer import upload

EXACT = {"enable_fp_fusion": False}  # launch option: products and sums are rounded one by one, as Pillow's C is
_BLOCK = 1024
_PRECISION = tl.constexpr(22)  # bits of a weight's fraction
_ONE, _HALF = tl.constexpr(1 << 22), tl.constexpr(1 << 21)


@dataclass(frozen=True)
class Images:
    """Where n images (h, w, 3) uint8 lie in a device's memory; whoever uses this keeps them there for as long."""

    addresses: torch.Tensor  # (n,) int64, on that device
    widths: torch.Tensor  # (n,) int64, pixels; likewise
    memory: torch.Tensor | None = None  # that they lie in, if it is to live as long as this


def resample(images: Images, plan: ViewPlan) -> torch.Tensor:
    """The views (n, size, size, 3) of the images, on their device, before the photometric operations."""
    device, size, n = images.addresses.device, plan.spec.size, len(plan)
    box, edge = upload(plan.box, device), upload(plan.edge, device)
    most = _most_taps(plan)
    first, count = torch.empty((2, n, 2, size), dtype=torch.int32, device=device)
    weights = torch.empty((n, 2, size, most), dtype=torch.int32, device=device)
    _find_taps[(n, 2, triton.cdiv(size, _BLOCK))](
        box, edge, upload(plan.flip, device), first, count, weights, size, most, plan.spec.is_cubic, _BLOCK, **EXACT
    )
    vertical_first = _is_vertical_first(plan)
    sizes = size * np.where(vertical_first, plan.edge[:, 3], plan.edge[:, 2])
    starts, order = upload(np.cumsum(sizes) - sizes, device), upload(vertical_first, device)
    between = torch.empty((int(sizes.sum()), 3), dtype=torch.uint8, device=device)
    _resize_along_first[(n, triton.cdiv(int(sizes.max()), _BLOCK))](
        images.addresses, images.widths, edge, order, first, count, weights, starts, between, size, most, _BLOCK
    )
    views = torch.empty((n, size, size, 3), dtype=torch.uint8, device=device)
    _resize_along_second[(n, triton.cdiv(size * size, _BLOCK))](
        between, starts, edge, order, first, count, weights, views, size, most, _BLOCK
    )
    return views


def _is_vertical_first(plan: ViewPlan) -> NDArray[np.bool_]:
    """Pillow's rule since version 13 (python-pillow/Pillow#9549): when the height shrinks by much more."""
    resized = np.rint(plan.edge[:, 2:] * plan.spec.size / plan.box[:, 2:])
    less_height, less_width = (plan.edge[:, 2:] - resized).T
    return (less_height > 0) & (less_height > 2 * less_width)


def _most_taps(plan: ViewPlan) -> int:
    """The most source pixels that one output pixel is made of, along either axis."""
    scales: NDArray[np.float64] = plan.box[:, 2:] / plan.spec.size
    return 2 * int(np.ceil((1 + plan.spec.is_cubic) * max(1.0, float(scales.max())))) + 1


@triton.jit
def _find_taps(box, edge, flip, first, count, weights, size, most, cubic, block: tl.constexpr):
    """For each image, axis and output pixel: the first source pixel within the edge, how many, and their weights.

    first, count (n, 2, size), weights (n, 2, size, most) int32, in units of 2**-22; axis 0 is vertical.
    """
    image, axis = tl.program_id(0), tl.program_id(1)
    i = tl.program_id(2) * block + tl.arange(0, block)
    inside = i < size
    start = tl.load(box + image * 4 + axis) - tl.load(edge + image * 4 + axis).to(tl.float64)
    limit = tl.load(edge + image * 4 + 2 + axis).to(tl.int32)
    scale = tl.load(box + image * 4 + 2 + axis) / size
    widening = tl.maximum(scale, 1.0)
    support = tl.where(cubic, 2.0, 1.0) * widening
    centre = start + (i.to(tl.float64) + 0.5) * scale
    low = tl.maximum((centre - support + 0.5).to(tl.int32), 0)
    high = tl.minimum((centre + support + 0.5).to(tl.int32), limit)
    total = tl.zeros((block,), tl.float64)
    for k in range(most):
        total += _filter(low + k, high, centre, widening, cubic)
    total = tl.where(inside, total, 1.0)
    mirrored = (axis == 1) & (tl.load(flip + image) != 0)
    out = (image * 2 + axis) * size + tl.where(mirrored, size - 1 - i, i)
    tl.store(first + out, low, mask=inside)
    tl.store(count + out, high - low, mask=inside)
    for k in range(most):
        weight = _filter(low + k, high, centre, widening, cubic) / total * _ONE
        weight = tl.where(weight >= 0, weight + 0.5, weight - 0.5).to(tl.int32)
        tl.store(weights + out.to(tl.int64) * most + k, weight, mask=inside)


@triton.jit
def _filter(pixel, high, centre, widening, cubic):
    """The filter at source pixels (see `pipeline.kernels.resample`), not normalised; 0 from ``high`` on."""
    x = tl.abs((pixel.to(tl.float64) - centre + 0.5) * (1.0 / widening))
    inner = (1.5 * x - 2.5) * x * x + 1.0
    outer = tl.where(x < 2.0, (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5, 0.0)
    value = tl.where(cubic, tl.where(x < 1.0, inner, outer), tl.maximum(1.0 - x, 0.0))
    return tl.where(pixel < high, value, 0.0)


@triton.jit
def _resize_along_first(
    addresses, widths, edge, order, first, count, weights, starts, between, size, most, block: tl.constexpr
):
    """From the images to ``between``: each image's edge with one axis resized, pixels (h * size, 3) or (size * w, 3).

    ``order`` (n,) is true where the vertical axis comes first.
    """
    image = tl.program_id(0)
    pixel = tl.program_id(1) * block + tl.arange(0, block)
    vertical = tl.load(order + image) != 0
    top, left = tl.load(edge + image * 4), tl.load(edge + image * 4 + 1)
    height, width = tl.load(edge + image * 4 + 2), tl.load(edge + image * 4 + 3)
    width_between = tl.where(vertical, width, size)
    inside = pixel < tl.where(vertical, size, height) * width_between
    y, x = pixel // width_between, pixel % width_between
    taps = (image * 2 + tl.where(vertical, 0, 1)) * size + tl.where(vertical, y, x)
    begin = tl.load(first + taps, mask=inside, other=0)
    pitch = tl.load(widths + image)
    corner = (top + tl.where(vertical, begin, y)) * pitch + left + tl.where(vertical, x, begin)
    source = tl.load(addresses + image).to(tl.pointer_type(tl.uint8)) + corner * 3
    target = between + (tl.load(starts + image) + pixel) * 3
    _combine(source, tl.where(vertical, pitch, 1) * 3, target, count, weights, taps, most, inside, block)


@triton.jit
def _resize_along_second(between, starts, edge, order, first, count, weights, views, size, most, block: tl.constexpr):
    """From ``between``, along the other axis, to the views."""
    image = tl.program_id(0)
    pixel = tl.program_id(1) * block + tl.arange(0, block)
    vertical = tl.load(order + image) != 0
    width_between = tl.where(vertical, tl.load(edge + image * 4 + 3), size)
    inside = pixel < size * size
    y, x = pixel // size, pixel % size
    taps = (image * 2 + tl.where(vertical, 1, 0)) * size + tl.where(vertical, x, y)
    begin = tl.load(first + taps, mask=inside, other=0)
    corner = tl.where(vertical, y, begin) * width_between + tl.where(vertical, begin, x)
    source = between + (tl.load(starts + image) + corner) * 3
    target = views + (image.to(tl.int64) * size * size + pixel) * 3
    _combine(source, tl.where(vertical, 1, width_between) * 3, target, count, weights, taps, most, inside, block)


@triton.jit
def _combine(source, step, target, count, weights, taps, most, inside, block: tl.constexpr):
    """``target`` = the weighted sum of RGB pixels ``step`` bytes apart."""
    num = tl.load(count + taps, mask=inside, other=0)
    r = tl.full((block,), _HALF, tl.int32)
    g = r
    b = r
    for k in range(tl.max(num)):
        used = k < num
        weight = tl.load(weights + taps.to(tl.int64) * most + k, mask=used, other=0)
        pixel = source + k * step
        r += tl.load(pixel, mask=used, other=0).to(tl.int32) * weight
        g += tl.load(pixel + 1, mask=used, other=0).to(tl.int32) * weight
        b += tl.load(pixel + 2, mask=used, other=0).to(tl.int32) * weight
    tl.store(target, _clip(r), mask=inside)
    tl.store(target + 1, _clip(g), mask=inside)
    tl.store(target + 2, _clip(b), mask=inside)


@triton.jit
def _clip(total):
    """To 8 bits; the cubic filter overshoots at edges."""
    return tl.minimum(tl.maximum(total >> _PRECISION, 0), 255).to(tl.uint8)
