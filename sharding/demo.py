"""The demo data set: generated pictures of ten kinds of objects, in the form that ImageNet has on the hub.

    python -m sharding.demo --out sheet.png        # a contact sheet, a row per class

A class is a silhouette with its own kind of marking (a fish has scales, a leaf has veins). Everything else varies:
colours, size, position, turn and tilt, light, background, clutter, what is in front, exposure, sharpness, noise.
Colour and raw pixels tell little about the class, so that an encoder has to learn something to do well.

Distances and coordinates are in units of the object's radius; images are float32 (SIZE, SIZE, 3) in [0, 1].
"""

import argparse
import io
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sharding.command import UserError, command

if TYPE_CHECKING:
    from datasets import Dataset

Array = NDArray[np.floating]
Draws = np.random.Generator
Shape = Callable[[Array, Array], Array]  # signed distance to the outline at (u, v), v upwards; negative inside
Marking = Callable[[Array, Array], Array]  # 0 to 1 at (u, v): where the object has its second colour

SIZE = 96  # pixels
NUM_IMAGES = {"train": 4000, "test": 1000}
_STREAMS = {"train": 0, "test": 1}
_Y, _X = np.mgrid[1 : -1 : SIZE * 1j, -1 : 1 : SIZE * 1j].astype(np.float32)


def load_demo(split: str = "train", seed: int = 0, num_images: int | None = None) -> "Dataset":
    """The first ``num_images`` (None: all) of a split, with columns ``image`` (JPEG) and ``label``; classes take turns.

    Image i depends on (seed, split, i) only: a smaller ``num_images`` is a prefix, and splits share no randomness.
    Raises ValueError for an unknown split or a size below 1.
    """
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature
    from rich.progress import track

    if split not in NUM_IMAGES:
        raise UserError(f"demo: expected split {' or '.join(NUM_IMAGES)}, found {split!r}")
    count = NUM_IMAGES[split] if num_images is None else num_images
    if count < 1 or seed < 0:
        raise UserError(f"demo: expected num_images >= 1 and seed >= 0, found {count} and {seed}")
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(CLASSES))})
    indices = track(range(count), f"demo images, {split}", transient=True)
    images = [{"bytes": encode(draw(split, seed, i), _rng(split, seed, i, 1)), "path": None} for i in indices]
    labels = [i % len(CLASSES) for i in range(count)]
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def draw(split: str, seed: int, i: int) -> Array:
    """Picture i, of class ``i % len(CLASSES)``."""
    rng = _rng(split, seed, i, 0)
    shape, marking = list(CLASSES.values())[i % len(CLASSES)]
    light = _light(rng)
    canvas = _background(rng)
    if rng.random() < 0.5:
        canvas = _place(canvas, *_CLUTTER, light, rng, radius=rng.uniform(0.08, 0.25), reach=0.9)
    canvas = _place(canvas, shape, marking, light, rng, radius=rng.uniform(0.6, 0.9), reach=0.35)
    if rng.random() < 0.1:
        canvas = _place(canvas, *_CLUTTER, light, rng, radius=rng.uniform(0.08, 0.2), reach=0.9)
    return _photograph(canvas, rng)


def encode(image: Array, rng: Draws) -> bytes:
    buffer = io.BytesIO()
    pixels = Image.fromarray((image * 255 + 0.5).astype(np.uint8))
    pixels.save(buffer, "JPEG", quality=int(rng.integers(75, 96)))
    return buffer.getvalue()


def _rng(split: str, seed: int, i: int, stage: int) -> Draws:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, _STREAMS[split], i, stage])))


def _heart(u: Array, v: Array) -> Array:
    side, v = np.abs(u), v + 0.12
    square = (side + np.abs(v) - 0.75) / math.sqrt(2)
    return np.minimum(square, np.hypot(side - 0.375, v - 0.375) - 0.53)


def _gear(u: Array, v: Array) -> Array:
    radius = np.hypot(u, v)
    teeth = 0.6 * (radius - 0.78 - 0.13 * np.tanh(3 * np.cos(10 * np.arctan2(u, v))))
    return np.maximum(teeth, 0.28 - radius)


def _fish(u: Array, v: Array) -> Array:
    body = 0.45 * (np.hypot((u - 0.22) / 0.75, v / 0.48) - 1)
    tail = np.maximum((np.abs(v) - 0.9 * (-0.3 - u)) / 1.35, -0.95 - u)
    return np.minimum(body, tail)


def _mushroom(u: Array, v: Array) -> Array:
    cap = np.maximum(np.hypot(u, v + 0.05) - 0.92, -0.05 - v)
    stem = np.maximum(np.abs(u) - 0.28 + 0.1 * v, np.abs(v + 0.35) - 0.5)
    return np.minimum(cap, stem)


def _leaf(u: Array, v: Array) -> Array:
    blade = np.hypot(v, np.abs(u) + 0.6) - 1.1
    return np.minimum(blade, np.maximum(np.abs(u) - 0.05, np.abs(v + 0.9) - 0.25))


def _step(x: Array, softness: float = 0.15) -> Array:
    """A soft 0 to 1 step at x = 0, ``softness`` wide."""
    return np.clip(x / softness + 0.5, 0, 1)


def _spots(u: Array, v: Array, spacing: float, radius: float) -> Array:
    """Dots on a staggered grid, ``radius`` relative to its ``spacing``."""
    row = v / spacing
    column = u / spacing + 0.5 * (np.floor(row) % 2)
    return _step(radius - np.hypot(column % 1 - 0.5, row % 1 - 0.5), 0.12)


def _sprinkles(u: Array, v: Array) -> Array:
    return np.maximum(_spots(u, 0.4 * v + 0.3 * u, 0.3, 0.25), _spots(0.4 * u - 0.3 * v, v, 0.3, 0.25))


def _scales(u: Array, v: Array) -> Array:
    column = u / 0.3
    row = v / 0.3 + 0.5 * (np.floor(column) % 2)
    return _step(np.hypot(column % 1, row % 1 - 0.5) - 0.55, 0.3)


def _craters(u: Array, v: Array) -> Array:
    return 1 - np.maximum(_spots(u, v, 0.37, 0.25), _spots(v + 0.1, u, 0.23, 0.2))


def _veins(u: Array, v: Array) -> Array:
    return np.maximum(_step(0.05 - np.abs(u), 0.05), _step(np.sin(15 * (v - 0.8 * np.abs(u))) - 0.5, 0.5))


CLASSES: dict[str, tuple[Shape, Marking]] = {
    "ball": (
        lambda u, v: np.hypot(u, v) - 0.85,
        lambda u, v: _step(np.sin(4 * np.arctan2(v - 0.25, u + 0.1)), 0.4),
    ),
    "donut": (lambda u, v: np.abs(np.hypot(u, v) - 0.6) - 0.3, _sprinkles),
    "star": (
        lambda u, v: 0.6 * (np.hypot(u, v) - 0.6 - 0.33 * np.cos(5 * np.arctan2(u, v))),
        lambda u, v: _step(np.cos(11 * np.hypot(u, v)), 0.5),
    ),
    "heart": (_heart, lambda u, v: _step(np.sin(6.5 * (u + v)) * np.sin(6.5 * (u - v)), 0.3)),
    "flower": (
        lambda u, v: 0.7 * (np.hypot(u, v) - 0.45 - 0.5 * np.abs(np.cos(3 * np.arctan2(u, v)))),
        lambda u, v: _step(np.hypot(u, v) - 0.3, 0.06),
    ),
    "gear": (_gear, lambda u, v: 0.5 + 0.5 * np.sin(26 * np.hypot(u, v))),
    "fish": (_fish, _scales),
    "mushroom": (_mushroom, lambda u, v: _spots(u, v, 0.42, 0.3) * _step(v + 0.05)),
    "moon": (lambda u, v: np.maximum(np.hypot(u, v) - 0.92, 0.75 - np.hypot(u - 0.5, v - 0.1)), _craters),
    "leaf": (_leaf, _veins),
}

# What lies about: two-coloured bricks.
_CLUTTER: tuple[Shape, Marking] = (
    lambda u, v: np.maximum(np.abs(u) - 0.9, np.abs(v) - 0.4),
    lambda u, v: _step(u + v),
)


def _light(rng: Draws) -> Array:
    """The direction towards the light, a unit vector (x right, y up, z towards the viewer), from above."""
    angle, height = np.pi / 2 + rng.uniform(-1, 1), rng.uniform(0.45, 0.85)
    flat = math.sqrt(1 - height**2)
    return np.array([flat * math.cos(angle), flat * math.sin(angle), height], np.float32)


def _colour(rng: Draws, value: tuple[float, float]) -> Array:
    """A random hue and saturation with the given range of brightness, (3,)."""
    hue, saturation, top = rng.random(), rng.uniform(0.1, 0.95), rng.uniform(*value)
    ramp = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return (top * (1 - saturation * (1 - ramp))).astype(np.float32)


def _mix(first: Array, second: Array, share: Array) -> Array:
    """``share`` (SIZE, SIZE) of the second."""
    return first + share[..., None] * (second - first)


def _clouds(rng: Draws, cells: int, octaves: int) -> Array:
    """Smooth noise in [0, 1], its coarsest grain SIZE / ``cells`` pixels."""
    total = np.zeros((SIZE, SIZE), np.float32)
    for octave in range(octaves):
        grid = rng.random((cells * 2**octave, cells * 2**octave), dtype=np.float32)
        total += np.asarray(Image.fromarray(grid).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) * 0.5**octave
    low, high = total.min(), total.max()
    return (total - low) / (high - low)


def _background(rng: Draws) -> Array:
    """Two colours, mixed by a gradient, clouds, stripes or dots, under a faint cloud layer."""
    angle, period = rng.uniform(0, np.pi), rng.uniform(8, 30)
    u, v = _X * math.cos(angle) + _Y * math.sin(angle), _Y * math.cos(angle) - _X * math.sin(angle)
    kind = rng.integers(8)
    if kind <= 3:
        pattern = 0.5 + 0.5 * u
    elif kind <= 5:
        pattern = _clouds(rng, int(rng.integers(2, 12)), 4)
    elif kind == 6:
        pattern = _step(np.sin(period * u), 0.5)
    else:
        pattern = _spots(u, v, 6 / period, 0.3)
    share = rng.uniform(0.15, 0.45) * pattern + 0.2 * _clouds(rng, 3, 3)
    return _mix(_colour(rng, (0.25, 1.0)), _colour(rng, (0.25, 1.0)), np.clip(share, 0, 1).astype(np.float32))


def _place(
    canvas: Array, shape: Shape, marking: Marking, light: Array, rng: Draws, *, radius: float, reach: float
) -> Array:
    """The canvas with a shaded object of random pose and colours on it, and the object's shadow.

    ``radius`` is relative to half the image; the centre is up to ``reach`` away from the image's.
    """
    u, v = _pose(rng, radius, reach)
    distance = shape(u, v).astype(np.float32)
    pixel = 2 / SIZE / radius
    cover = np.clip(0.5 - distance / pixel, 0, 1)
    pattern = marking(u, v).astype(np.float32)
    colour = _mix(_colour(rng, (0.1, 0.5)), _colour(rng, (0.7, 1.0)), pattern)  # differ in grey too
    lit = _shade(colour, distance, pattern, light, pixel, rng)
    shadow = _shift(np.clip(0.5 - distance / (6 * pixel), 0, 1), -rng.uniform(2, 7) * light)
    return _mix(canvas * (1 - 0.6 * shadow[..., None]), lit, cover)


def _shift(layer: Array, by: Array) -> Array:
    """The layer moved by (x, y) pixels, y up, at most 7; its edges are repeated."""
    right, up = round(by[0]), round(by[1])
    return np.pad(layer, 7, mode="edge")[7 + up : 7 + up + SIZE, 7 - right : 7 - right + SIZE]


def _pose(rng: Draws, radius: float, reach: float) -> tuple[Array, Array]:
    """Object coordinates (u, v) of every pixel: shifted, turned, foreshortened along one axis, perhaps mirrored."""
    x = (_X - rng.uniform(-reach, reach)) / radius
    y = (_Y - rng.uniform(-reach, reach)) / radius
    turn, axis, tilt = rng.uniform(-0.5, 0.5), rng.uniform(0, np.pi), rng.uniform(1, 1.2)
    along, across = x * math.cos(axis) + y * math.sin(axis), (y * math.cos(axis) - x * math.sin(axis)) * tilt
    back = turn - axis
    u, v = along * math.cos(back) + across * math.sin(back), across * math.cos(back) - along * math.sin(back)
    mirrored = rng.random() < 0.5
    return (-u if mirrored else u).astype(np.float32), v.astype(np.float32)


def _shade(colour: Array, distance: Array, pattern: Array, light: Array, pixel: float, rng: Draws) -> Array:
    """Diffuse and specular light on a surface that is rounded towards its outline and embossed by its marking."""
    rim = np.clip(1 + distance / rng.uniform(0.3, 0.6), 0, 1)
    height = np.sqrt(1 - rim**2 + 1e-3) * 0.4 + 0.03 * pattern
    down, right = np.gradient(height, pixel)
    scale = 1 / np.sqrt(1 + down**2 + right**2)
    facing = np.clip((light[2] - right * light[0] + down * light[1]) * scale, 0, 1)
    gloss = rng.uniform(0, 0.7) * facing ** rng.uniform(8, 40)
    return np.clip(colour * (0.4 + 0.75 * facing)[..., None] + gloss[..., None], 0, 1)


def _photograph(canvas: Array, rng: Draws) -> Array:
    """Uneven light, exposure, white balance and sensor noise."""
    angle = rng.uniform(0, 2 * np.pi)
    falloff = 1 + rng.uniform(0, 0.4) * (_X * math.cos(angle) + _Y * math.sin(angle))
    tint = (rng.uniform(0.85, 1.15, 3) * rng.uniform(0.8, 1.2)).astype(np.float32)
    noise = rng.uniform(0.005, 0.02) * rng.standard_normal(canvas.shape, np.float32)
    return np.clip(canvas * falloff[..., None] * tint + noise, 0, 1).astype(np.float32)


def contact_sheet(seed: int, columns: int = 12) -> Image.Image:
    """The first ``columns`` images of each class, a row per class."""
    rows = [
        np.hstack([draw("train", seed, label + column * len(CLASSES)) for column in range(columns)])
        for label in range(len(CLASSES))
    ]
    return Image.fromarray((np.vstack(rows) * 255 + 0.5).astype(np.uint8))


@command("sharding.demo")
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sharding.demo", description="Draw a sheet of the demo's images.")
    parser.add_argument("--out", type=Path, required=True, help="picture to write, e.g. sheet.png")
    parser.add_argument("--seed", type=int, default=0, help="of the data set (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.seed < 0:
        parser.error(f"argument --seed: expected 0 or more, found {options.seed}")
    contact_sheet(options.seed).save(options.out)
    print(f"{options.out}: a row per class: {', '.join(CLASSES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
