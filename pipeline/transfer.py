"""From uint8 views, wherever a backend made them, to the tensors that a network takes."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from pipeline.backends import Views
from pipeline.memory import recycler
from pipeline.plan import BatchPlan

_PART = 2**26  # values, 256 MiB in float32


def to_batch(views: Views, plan: BatchPlan, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Views (n, H, W, 3) uint8 as (n, 3, H, W) channels_last on ``device``, normalised by their specs."""
    return [
        normalize(images, view.spec.mean, view.spec.std, dtype)
        for images, view in zip(to_device(views, device), plan.views, strict=True)
    ]


def to_device(views: Views, device: torch.device) -> Views:
    """The views on ``device``, not waiting for the copy. torch keeps the pinned memory (from which it must start to be
    asynchronous) until the copy is done.
    """
    if all(images.device.type == device.type for images in views):
        return views
    return beside(device, lambda to: [images.pin_memory().to(to, non_blocking=True) for images in views])


def beside(device: torch.device, make: Callable[[torch.device], Views]) -> Views:
    """What ``make`` queues for ``device``, on a stream of its own, so that it overlaps with what the caller's stream
    still has to do; that one waits for it, and the host does not.
    """
    if device.type == "cpu":
        return make(device)
    stream, current = _side_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        made = make(device)
    current.wait_stream(stream)
    for tensor in made:
        tensor.record_stream(current)
    return made


def normalize(
    images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype
) -> torch.Tensor:
    """``(images / 255 - mean) / std`` of (n, H, W, 3) uint8 as (n, 3, H, W), channels_last in memory."""
    scale, shift = _row_constants(mean, std, images.shape[2], images.device)
    if images.device.type == "cpu":
        values = recycler.empty(images.shape, torch.float32)
        rows = images.contiguous().view(-1, len(scale)), values.view(-1, len(scale))
        _scale_rows(rows[0].numpy(), scale.numpy(), shift.numpy(), rows[1].numpy())
    else:
        values = _scale_parts(images, scale, shift, dtype)
    return values.to(dtype).permute(0, 3, 1, 2)


def _scale_parts(images: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Some images at a time in float32, since large views would take four times the memory of what they become."""
    values = torch.empty(images.shape, dtype=dtype, device=images.device)
    count = max(1, _PART // images.shape[1:].numel())
    for part, made in zip(images.split(count), values.split(count), strict=True):
        made.flatten(2).copy_(torch.addcmul(shift, part.flatten(2).float(), scale))
    return values


@njit(nogil=True, cache=True)
def _scale_rows(
    rows: NDArray[np.uint8], scale: NDArray[np.float32], shift: NDArray[np.float32], out: NDArray[np.float32]
) -> None:
    for y in range(rows.shape[0]):
        row, values = rows[y], out[y]
        for x in range(len(scale)):
            values[x] = np.float32(row[x]) * scale[x] + shift[x]


@cache
def _row_constants(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor and summand (3 * width,) of a row of pixels, kept on the device: making them there would wait for it."""
    scale = torch.tensor([1 / (255 * s) for s in std])
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])
    return scale.repeat(width).to(device), shift.repeat(width).to(device)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def upload(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy on the current stream of ``device``, not waited for."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
