"""The demo data set: generated pictures of ten kinds of objects, in the form that ImageNet has on the hub.

A class is a silhouette with its own kind of marking (a fish has scales, a leaf has veins). Everything else varies:
colours, size, position, turn and tilt, light, background, exposure, noise. Colour and raw pixels tell little about the
class, so that an encoder has to learn something to do well.
"""

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy import abs, arctan2, cos, floor, hypot, maximum, minimum, sin  # noqa: A004
from numpy.typing import NDArray
from PIL import Image

from sharding.command import UserError

if TYPE_CHECKING:
    from datasets import Dataset

Array = NDArray[np.floating]
Drawing = Callable[[Array, Array, Array, Array], tuple[Array, Array]]

SIZE = 96  # pixels
NUM_IMAGES = {"train": 4000, "test": 1000}
_STREAMS = {"train": 0, "test": 1}
_Y, _X = np.mgrid[1 : -1 : SIZE * 1j, -1 : 1 : SIZE * 1j].astype(np.float32)


def _dots(u: Array, v: Array, spacing: float) -> Array:
    """Positive on dots of a staggered grid."""
    column = u / spacing + 0.5 * (floor(v / spacing) % 2)
    return 0.3 - hypot(column % 1 - 0.5, v / spacing % 1 - 0.5)


# Of coordinates (u to the right, v upwards, the object within +-1; radius r and angle a): about the distance to the
# outline, negative inside, and what is positive where the marking is.
CLASSES: dict[str, Drawing] = {
    "ball": lambda u, v, r, _: (r - 0.85, sin(4 * arctan2(v - 0.25, u + 0.1))),
    "donut": lambda u, v, r, _: (abs(r - 0.6) - 0.3, _dots(u, 0.4 * v + 0.3 * u, 0.3)),
    "star": lambda _u, _v, r, a: (0.6 * (r - 0.6 - 0.33 * cos(5 * a)), cos(11 * r)),
    "heart": lambda u, v, *_: (
        minimum(0.7 * (abs(u) + abs(v + 0.12) - 0.75), hypot(abs(u) - 0.375, v - 0.255) - 0.53),
        sin(6.5 * (u + v)) * sin(6.5 * (u - v)),
    ),
    "flower": lambda _u, _v, r, a: (0.7 * (r - 0.45 - 0.5 * abs(cos(3 * a))), r - 0.3),
    "gear": lambda _u, _v, r, a: (maximum(0.6 * (r - 0.78 - 0.13 * cos(10 * a)), 0.28 - r), sin(26 * r)),
    "fish": lambda u, v, *_: (
        minimum(0.45 * hypot((u - 0.22) / 0.75, v / 0.48) - 0.45, maximum((abs(v) + 0.9 * u + 0.27) / 1.35, -0.95 - u)),
        hypot(u / 0.3 % 1, (v / 0.3 + 0.5 * (floor(u / 0.3) % 2)) % 1 - 0.5) - 0.55,
    ),
    "mushroom": lambda u, v, r, _: (
        minimum(maximum(r - 0.92, -v), maximum(abs(u) - 0.3, abs(v + 0.35) - 0.5)),
        minimum(_dots(u, v, 0.42), v),
    ),
    "moon": lambda u, v, r, _: (
        maximum(r - 0.92, 0.75 - hypot(u - 0.5, v - 0.1)),
        -maximum(_dots(u, v, 0.37), _dots(v + 0.1, u, 0.23)),
    ),
    "leaf": lambda u, v, *_: (
        minimum(hypot(v, abs(u) + 0.6) - 1.1, maximum(abs(u) - 0.05, abs(v + 0.9) - 0.25)),
        maximum(0.06 - abs(u), 0.1 * sin(15 * (v - 0.8 * abs(u))) - 0.05),
    ),
}


def load_demo(split: str = "train", seed: int = 0, num_images: int | None = None) -> "Dataset":
    """The first ``num_images`` (None: all) of a split, with columns ``image`` (JPEG) and ``label``; classes take turns.

    Image i depends on (seed, split, i) only: a smaller ``num_images`` is a prefix, and splits share no randomness.
    Raises ValueError for an unknown split or a size below 1.
    """
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    from sharding.progress import steps

    if split not in NUM_IMAGES:
        raise UserError(f"demo: expected split {' or '.join(NUM_IMAGES)}, found {split!r}")
    count = NUM_IMAGES[split] if num_images is None else num_images
    if count < 1 or seed < 0:
        raise UserError(f"demo: expected num_images >= 1 and seed >= 0, found {count} and {seed}")
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(CLASSES))})
    indices = steps(range(count), f"demo images, {split}")
    images = [{"bytes": _encode(draw(split, seed, i)), "path": None} for i in indices]
    return Dataset.from_dict({"image": images, "label": [i % len(CLASSES) for i in range(count)]}, features=features)


def draw(split: str, seed: int, i: int) -> Array:
    """Picture i, of class ``i % len(CLASSES)``: float32 (SIZE, SIZE, 3) in [0, 1]."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, _STREAMS[split], i])))
    radius, angle = rng.uniform(0.6, 0.9), rng.uniform(0, 2 * np.pi)
    u, v = _pose(rng, radius)
    distance, marking = list(CLASSES.values())[i % len(CLASSES)](u, v, hypot(u, v), arctan2(u, v))
    cover = np.clip(0.5 - distance * radius * SIZE / 2, 0, 1)  # a pixel is 2 / SIZE wide
    pattern = np.clip(0.5 + marking / 0.15, 0, 1)
    light = np.clip(-distance / 0.4, 0, 1) ** 0.5 * (0.7 + 0.3 * (u * cos(angle) + v * sin(angle)))  # round and lit
    body = _mix(_colour(rng, 0.1, 0.5), _colour(rng, 0.7, 1.0), pattern) * (0.45 + 0.65 * light[..., None])
    picture = _mix(_mix(_colour(rng, 0.25, 1.0), _colour(rng, 0.25, 1.0), 0.6 * _clouds(rng)), body, cover)
    picture = picture * rng.uniform(0.7, 1.3) + rng.uniform(0.005, 0.02) * rng.standard_normal(picture.shape)
    return np.clip(picture, 0, 1).astype(np.float32)


def _pose(rng: np.random.Generator, radius: float) -> tuple[Array, Array]:
    """Object coordinates (u, v) of every pixel: shifted, turned, foreshortened, perhaps mirrored."""
    x, y = (_X - rng.uniform(-0.35, 0.35)) / radius, (_Y - rng.uniform(-0.35, 0.35)) / radius
    turn, tilt, mirror = rng.uniform(-0.5, 0.5), rng.uniform(1, 1.2, 2), rng.choice([-1, 1])
    return mirror * tilt[0] * (x * cos(turn) + y * sin(turn)), tilt[1] * (y * cos(turn) - x * sin(turn))


def _colour(rng: np.random.Generator, darkest: float, brightest: float) -> Array:
    """A random hue and saturation, its largest channel in the given range, (3,)."""
    ramp = np.clip(abs((rng.random() * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return rng.uniform(darkest, brightest) * (1 - rng.uniform(0.1, 0.95) * (1 - ramp))


def _mix(first: Array, second: Array, share: Array) -> Array:
    """``share`` (SIZE, SIZE) of the second."""
    return first + share[..., None] * (second - first)


def _clouds(rng: np.random.Generator) -> Array:
    """Smooth noise of two random grains, (SIZE, SIZE) in about [0, 1]."""
    grids = [Image.fromarray(rng.random((n, n), np.float32)) for n in (rng.integers(2, 6), rng.integers(6, 24))]
    return np.mean([np.asarray(grid.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for grid in grids], axis=0)


def _encode(picture: Array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((picture * 255 + 0.5).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
