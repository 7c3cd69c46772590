"""From planes of YCbCr 4:2:0 to pixels on a GPU, by Triton: the twin of `pipeline.kernels.planes`, equal to the bit."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton gives its kernels their types when it compiles them.

import numpy as np
import torch
import triton
import triton.language as tl

from pipeline.kernels.resample_gpu import Images
from pipeline.plan import BatchPlan, Ints
from pipeline.transfer import upload

_BLOCK = 1024


def convert(frames: torch.Tensor, ends: Ints, plan: BatchPlan) -> Images:
    """The plan's images as RGB, of which only the plan's regions exist, on the device of ``frames``.

    ``frames`` (bytes,) uint8 holds a frame of each (see `sharding.planes`), number i ending before byte ``ends[i]``.
    """
    device, (top, left, height, width) = frames.device, plan.regions.T
    sizes = height * width
    starts = np.cumsum(sizes) - sizes
    luma = ends - plan.heights * plan.widths - 2 * ((plan.heights + 1) // 2) * ((plan.widths + 1) // 2)
    where = np.stack([luma, plan.heights, plan.widths, top, left, width, sizes, starts], axis=1)
    pixels = torch.empty((int(sizes.sum()), 3), dtype=torch.uint8, device=device)
    _convert[(len(plan), triton.cdiv(int(sizes.max()), _BLOCK))](frames, upload(where, device), pixels, _BLOCK)
    corners = pixels.data_ptr() + 3 * (starts - top * width - left)
    return Images(upload(corners, device), upload(width, device), pixels)


@triton.jit
def _convert(frames, where, pixels, block: tl.constexpr):
    """``where`` (n, 8) int64: an image's first byte in ``frames``, its height and width; top, left, width and number of
    pixels of its region, and where in ``pixels`` that begins."""
    row = where + tl.program_id(0) * 8
    height, width = tl.load(row + 1).to(tl.int32), tl.load(row + 2).to(tl.int32)
    top, left, pitch = tl.load(row + 3).to(tl.int32), tl.load(row + 4).to(tl.int32), tl.load(row + 5).to(tl.int32)
    pixel = tl.program_id(1) * block + tl.arange(0, block)
    inside = pixel < tl.load(row + 6)
    y, x = top + pixel // pitch, left + pixel % pitch
    luma = frames + tl.load(row)
    rows, columns = (height + 1) // 2, (width + 1) // 2
    cb = luma + height * width
    level = tl.load(luma + y * width + x, mask=inside, other=0).to(tl.int32)
    u = _upsample(cb, y, x, rows, columns, inside)
    v = _upsample(cb + rows * columns, y, x, rows, columns, inside)
    target = pixels + (tl.load(row + 7) + pixel) * 3
    tl.store(target, _clip(level + ((91881 * v + 0x8000) >> 16)), mask=inside)
    tl.store(target + 1, _clip(level + ((-22554 * u - 46802 * v + 0x8000) >> 16)), mask=inside)
    tl.store(target + 2, _clip(level + ((116130 * u + 0x8000) >> 16)), mask=inside)


@triton.jit
def _upsample(plane, y, x, rows, columns, inside):
    """Chroma, less 128, of image pixels (y, x); libjpeg repeats the samples of planes of one or two columns."""
    reach = tl.where(columns > 2, 1, 0)
    far_y = tl.minimum(tl.maximum(y // 2 + (2 * (y % 2) - 1) * reach, 0), rows - 1)
    far_x = tl.minimum(tl.maximum(x // 2 + (2 * (x % 2) - 1) * reach, 0), columns - 1)
    nearer, farther = plane + y // 2 * columns, plane + far_y * columns
    here = 3 * _load(nearer + x // 2, inside) + _load(farther + x // 2, inside)
    there = 3 * _load(nearer + far_x, inside) + _load(farther + far_x, inside)
    return ((3 * here + there + 8 - x % 2) >> 4) - 128


@triton.jit
def _load(samples, inside):
    return tl.load(samples, mask=inside, other=0).to(tl.int32)


@triton.jit
def _clip(level):
    return tl.minimum(tl.maximum(level, 0), 255).to(tl.uint8)
