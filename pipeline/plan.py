"""From ids to everything that is random about their views: crops, flips, jitter, blur.

The parameters follow torchvision's sampling rules (`RandomResizedCrop.get_params`, `ColorJitter.get_params`,
`RandomApply`, `GaussianBlur.get_params`); the randomness is `pipeline.random`'s. A plan is data: a backend that is
given one draws nothing itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeline.random import UInt32, key_from_seed, philox, to_integer, to_range, to_unit
from pipeline.views import ViewSpec, flatten
from sharding.manifest import ShardSet

Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]
Ints = NDArray[np.int64]

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

# The fourth counter word: which draw of a view this is. A draw is four 32-bit words.
_CROP_ATTEMPTS = 10
_DRAW_CROP = 0  # to _CROP_ATTEMPTS - 1: area, ratio, top, left
_DRAW_SWITCHES = 10  # flip, jitter, grey, blur
_DRAW_FACTORS = 11  # brightness, contrast, saturation, hue
_DRAW_ORDER = 12  # ranks of the four jitter operations
_DRAW_REST = 13  # blur sigma, solarize, two unused


@dataclass(frozen=True)
class ViewPlan:
    """The parameters of one view of ``n`` images.

    box         (n, 4) float64: top, left, height, width in pixels of the decoded image
    edge        (n, 4) int64: top, left, height, width of the pixels that the resize may read: the box of a random
                crop, the whole image for a centre crop (which torchvision resizes before it crops)
    flip        (n,) bool: mirrored left to right
    jitter      (n,) bool: whether colour jitter applies
    order       (n, 4) int8: the jitter operations (BRIGHTNESS ... HUE) in the sequence in which they apply
    factors     (n, 4) float32: brightness, contrast, saturation factor; hue shift in turns
    grey        (n,) bool
    sigma       (n,) float32: of the blur in view pixels; 0 is no blur
    solarize    (n,) bool
    """

    spec: ViewSpec
    box: NDArray[np.float64]
    edge: Ints
    flip: Flags
    jitter: Flags
    order: NDArray[np.int8]
    factors: Floats
    grey: Flags
    sigma: Floats
    solarize: Flags

    def __len__(self) -> int:
        return len(self.box)

    def take(self, rows: slice | Ints) -> "ViewPlan":
        """The plan of the images at ``rows``, in their order."""
        arrays = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "spec"}
        return replace(self, **arrays)


@dataclass(frozen=True)
class BatchPlan:
    """All that a backend needs to make the batch of a step.

    ids             (n,) int64 sample ids
    heights, widths (n,) int64, pixels of the decoded images
    views           a `ViewPlan` of the n images per view
    """

    step: int
    ids: Ints
    heights: Ints
    widths: Ints
    views: tuple[ViewPlan, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def regions(self) -> Ints:
        """(n, 4) int64 top, left, height, width: the smallest part of each image that holds all that its views read."""
        edges = np.stack([view.edge for view in self.views])
        start, end = edges[..., :2].min(axis=0), (edges[..., :2] + edges[..., 2:]).max(axis=0)
        return np.concatenate([start, end - start], axis=1)

    def take(self, rows: slice | Ints) -> "BatchPlan":
        """The plan of the images at ``rows``, in their order."""
        arrays = {name: getattr(self, name)[rows] for name in ("ids", "heights", "widths")}
        return replace(self, **arrays, views=tuple(view.take(rows) for view in self.views))


def plan_samples(
    shards: ShardSet, specs: Sequence[ViewSpec], seed: int, step: int, ids: Ints, epochs: Ints
) -> BatchPlan:
    """`plan_batch` with the images' sizes looked up in the shards' index."""
    heights, widths = (sizes[ids].astype(np.int64) for sizes in (shards.index.height, shards.index.width))
    return plan_batch(specs, seed, step, ids, epochs, heights, widths)


def plan_batch(
    specs: Sequence[ViewSpec], seed: int, step: int, ids: Ints, epochs: Ints, heights: Ints, widths: Ints
) -> BatchPlan:
    """The plan of images ``ids`` (n,), seen in passes ``epochs`` (n,), of decoded ``heights``, ``widths`` (n,)."""
    views = tuple(
        plan_view(spec, seed, number, ids, epochs, heights, widths) for number, spec in enumerate(flatten(specs))
    )
    return BatchPlan(step, ids, heights, widths, views)


def plan_view(spec: ViewSpec, seed: int, view: int, ids: Ints, epochs: Ints, heights: Ints, widths: Ints) -> ViewPlan:
    """The plan of view number ``view``; see `plan_batch`."""
    key = key_from_seed(seed)

    def draw(number: int) -> UInt32:
        return philox(key, epochs, ids, view, number)

    switches, rest = to_unit(draw(_DRAW_SWITCHES)), draw(_DRAW_REST)
    if spec.crop == "random":
        attempts = np.stack([draw(_DRAW_CROP + i) for i in range(_CROP_ATTEMPTS)], axis=1)
        edge = _random_crops(spec, attempts, heights, widths)
        box = edge.astype(np.float64)
    else:
        zeros = np.zeros_like(heights)
        edge = np.stack([zeros, zeros, heights, widths], axis=1)
        box = _center_crops(spec, heights, widths)
    blurred = switches[:, 3] < spec.blur
    return ViewPlan(
        spec=spec,
        box=box,
        edge=edge,
        flip=switches[:, 0] < spec.flip,
        jitter=switches[:, 1] < spec.jitter,
        order=np.argsort(draw(_DRAW_ORDER), axis=1, kind="stable").astype(np.int8),
        factors=_jitter_factors(spec, draw(_DRAW_FACTORS)),
        grey=switches[:, 2] < spec.grey,
        sigma=np.where(blurred, to_range(rest[:, 0], *spec.sigma), 0).astype(np.float32),
        solarize=to_unit(rest[:, 1]) < spec.solarize,
    )


def _random_crops(spec: ViewSpec, attempts: UInt32, heights: Ints, widths: Ints) -> Ints:
    """The first of ten attempts (n, 10, 4) that fits, else the largest centred crop of an allowed ratio."""
    H, W = heights[:, None], widths[:, None]  # noqa: N806
    area = H * W * to_range(attempts[..., 0], *spec.scale)
    ratio = np.exp(to_range(attempts[..., 1], *np.log(spec.ratio)))
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= W) & (h > 0) & (h <= H)
    first = np.argmax(fits, axis=1)
    rows = np.arange(len(first))
    h, w = h[rows, first].astype(np.int64), w[rows, first].astype(np.int64)
    none = ~fits.any(axis=1)
    fallback_h, fallback_w = _fallback_sizes(spec, heights, widths)
    h, w = np.where(none, fallback_h, h), np.where(none, fallback_w, w)
    words = attempts[rows, first]
    top = np.where(none, (heights - h) // 2, to_integer(words[:, 2], heights - h + 1))
    left = np.where(none, (widths - w) // 2, to_integer(words[:, 3], widths - w + 1))
    return np.stack([top, left, h, w], axis=1)


def _fallback_sizes(spec: ViewSpec, heights: Ints, widths: Ints) -> tuple[Ints, Ints]:
    """At least one pixel high and wide, where torchvision's `get_params` rounds to none and then fails."""
    narrowest, widest = spec.ratio
    h = np.where(widths < narrowest * heights, np.rint(widths / narrowest).astype(np.int64), heights)
    w = np.where(widths > widest * heights, np.rint(heights * widest).astype(np.int64), widths)
    return np.maximum(1, h), np.maximum(1, w)


def _center_crops(spec: ViewSpec, heights: Ints, widths: Ints) -> NDArray[np.float64]:
    """`Resize(resize)` then `CenterCrop(size)`, as the box of the source image that the crop shows."""
    short = np.minimum(heights, widths)
    resized = np.stack([heights, widths], axis=1) * spec.resize // short[:, None]
    scale = np.stack([heights, widths], axis=1) / resized
    corner = np.rint((resized - spec.size) / 2) * scale
    return np.concatenate([corner, spec.size * scale], axis=1)


def _jitter_factors(spec: ViewSpec, words: UInt32) -> Floats:
    strengths = np.array([spec.brightness, spec.contrast, spec.saturation])
    factors = np.empty(words.shape, dtype=np.float32)
    factors[:, :HUE] = to_range(words[:, :HUE], np.maximum(0, 1 - strengths), 1 + strengths)
    factors[:, HUE] = to_range(words[:, HUE], -spec.hue, spec.hue)
    return factors
