"""SPDL: an asynchronous pipeline over a thread pool; FFmpeg decodes once, and one filter graph makes all views.

https://facebookresearch.github.io/spdl/main/best_practice.html
https://facebookresearch.github.io/spdl/main/io/advanced_filtering.html

Parameters are drawn as torchvision draws them, jitter in random order, and every operation is a filter of FFmpeg.
Flip, brightness, saturation, greyscale and solarize are torchvision's but for rounding. These are not: contrast is
about the middle grey, for want of a filter that knows the image's mean; hue turns the chroma plane of YCbCr, not HSV;
`gblur` is recursive, without window, and worst at the borders; where chroma is subsampled, crops begin and end at even
pixels.
"""

import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import spdl.io
import torch
from numpy.typing import NDArray
from spdl.io.utils import get_ffmpeg_versions
from spdl.pipeline import PipelineBuilder
from spdl.source.local_directory import LocalDirectory
from spdl.source.utils import repeat_source
from torchvision.transforms import ColorJitter, RandomResizedCrop

from benchmarks.peers import PeerOptions
from benchmarks.peers.dataloader import IteratorPeer, name_of, temporary_directory
from benchmarks.peers.imagefolder import unpack
from pipeline.views import ViewSpec

_QUEUED = 8  # batches in the stages and the queues between them; those of the sink come on top

# RGB to Y, Cb, Cr (ITU-R BT.601)
_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
_GREY = np.tile(_YCC[0], (3, 1))


def build(options: PeerOptions) -> IteratorPeer:
    try:
        get_ffmpeg_versions()
    except RuntimeError as error:
        raise ImportError("SPDL found no FFmpeg libraries (apt-get install ffmpeg)") from error
    directory = temporary_directory(options)
    unpack(options.shards, name_of(directory))
    return IteratorPeer(_batches(name_of(directory), options), options.prefetch + _QUEUED, directory)


def _batches(folder: Path, options: PeerOptions) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
    """Starts its threads with the first batch, when other peers have forked their workers."""
    pipeline = (
        PipelineBuilder()
        .add_source(repeat_source(LocalDirectory(folder, "*/*.jpg")))
        .pipe(partial(_make_views, options.specs), concurrency=options.num_threads)
        .aggregate(options.batch_size)
        .pipe(partial(_collate, options.specs))
        .add_sink(options.prefetch)
        .build(num_threads=options.num_threads, max_failures=0)
    )
    with pipeline.auto_stop():
        yield from pipeline


def _make_views(specs: Sequence[ViewSpec], path: Path) -> tuple[list[Any], int]:
    """A frame per view, 8-bit RGB, and the label."""
    packets = spdl.io.demux_image(str(path))
    graph = spdl.io.FilterGraph(_graph(specs, packets.codec))
    graph.add_frames(spdl.io.decode_packets(packets, filter_desc=None))
    graph.flush()
    return [graph.get_frames(key=f"buffersink@{view}") for view in range(len(specs))], int(path.parent.name)


def _collate(
    specs: Sequence[ViewSpec], samples: Sequence[tuple[list[Any], int]]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    frames, labels = zip(*samples, strict=True)
    views = [_normalized(spec, same) for spec, same in zip(specs, zip(*frames, strict=True), strict=True)]
    return views, torch.tensor(labels)


def _normalized(spec: ViewSpec, frames: Sequence[Any]) -> torch.Tensor:
    pixels = spdl.io.to_torch(spdl.io.convert_frames(list(frames)))  # (b, 1, size, size, 3) uint8
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    return pixels.squeeze(1).permute(0, 3, 1, 2).float().sub_(mean).div_(std)


def _graph(specs: Sequence[ViewSpec], codec: Any) -> str:
    ways = "".join(f"[{view}]" for view in range(len(specs)))
    views = [
        f"[{view}]{','.join(_filters(spec, codec.height, codec.width))},buffersink@{view}"
        for view, spec in enumerate(specs)
    ]
    return ";".join([f"{spdl.io.get_buffer_desc(codec)},split={len(specs)}{ways}", *views])


def _filters(spec: ViewSpec, height: int, width: int) -> Iterator[str]:
    yield _resized_crop(spec, height, width)
    yield "format=gbrp"  # RGB in planes, which all of these filters take
    if random.random() < spec.flip:
        yield "hflip"
    if random.random() < spec.jitter:
        yield from _jitter(spec)
    if random.random() < spec.grey:
        yield _mixed(_GREY)
    if random.random() < spec.blur:
        yield f"gblur=sigma={random.uniform(*spec.sigma):.4f}"
    if random.random() < spec.solarize:
        yield "lutrgb=" + ":".join(f"{channel}='if(gte(val,128),negval,val)'" for channel in "rgb")
    yield "format=rgb24"


def _resized_crop(spec: ViewSpec, height: int, width: int) -> str:
    if spec.crop == "center":
        size = f"{spec.resize}:{spec.resize}:force_original_aspect_ratio=increase"
        return f"scale={size}:flags=bilinear,crop={spec.size}:{spec.size}"
    image = torch.empty(height, width, device="meta")  # torchvision asks for its size only
    top, left, height, width = RandomResizedCrop.get_params(image, list(spec.scale), list(spec.ratio))
    return f"crop={width}:{height}:{left}:{top},scale={spec.size}:{spec.size}:flags=bilinear"


def _jitter(spec: ViewSpec) -> Iterator[str]:
    jitter = ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue)
    order, *factors = jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    filters = (_brightness, _contrast, _saturation, _hue)
    for operation in order.tolist():
        if factors[operation] is not None:
            yield filters[operation](factors[operation])


def _brightness(factor: float) -> str:
    return _mixed(factor * np.eye(3))


def _contrast(factor: float) -> str:
    """About the middle grey."""
    source, target = 0.5 / max(factor, 1), 0.5 * min(factor, 1)
    ends = {"imin": 0.5 - source, "imax": 0.5 + source, "omin": 0.5 - target, "omax": 0.5 + target}
    return "colorlevels=" + ":".join(f"{channel}{end}={ends[end]:.5f}" for channel in "rgb" for end in ends)


def _saturation(factor: float) -> str:
    return _mixed(factor * np.eye(3) + (1 - factor) * _GREY)


def _hue(turns: float) -> str:
    """What FFmpeg's `hue` does, without its detour over YCbCr in 8 bits."""
    cos, sin = np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)
    turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    return _mixed(np.linalg.inv(_YCC) @ turn @ _YCC)


def _mixed(matrix: NDArray[np.float64]) -> str:
    """Each channel a sum of all, clamped to [0, 255]."""
    weights = (f"{to}{of}={matrix[i, j]:.5f}" for i, to in enumerate("rgb") for j, of in enumerate("rgb"))
    return "colorchannelmixer=" + ":".join(weights)
