"""Images, plans and the reference for the tests of the Triton kernels: on a GPU if there is one, else interpreted."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image

from pipeline.kernels.resample_gpu import Images
from pipeline.plan import ViewPlan, plan_view
from pipeline.views import ViewSpec
from tests.pipeline.reference import apply

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Older ones always resize along the width first, which moves some values by 1.
SAME_RESIZE = int(PIL.__version__.split(".")[0]) >= 13


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Coloured patches with noise, (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return (smooth + rng.integers(-30, 31, smooth.shape)).clip(0, 255).astype(np.uint8)


def plan_for(images: list[np.ndarray], seed: int = 0, **spec: Any) -> ViewPlan:
    heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (0, 1))
    ids = np.arange(len(images))
    return plan_view(ViewSpec(**spec), seed, 0, ids, np.zeros_like(ids), heights, widths)


def expected(images: list[np.ndarray], plan: ViewPlan) -> np.ndarray:
    """What torchvision makes of images, by Pillow."""
    return np.stack([np.asarray(apply(Image.fromarray(image), plan, row)) for row, image in enumerate(images)])


@contextmanager
def on_device(images: list[np.ndarray]) -> Iterator[Images]:
    """They are there for the duration of the block, at whose end results must have been read."""
    tensors = [torch.from_numpy(image).to(DEVICE) for image in images]
    values = [[image.data_ptr() for image in tensors], [image.shape[1] for image in tensors]]
    yield Images(*torch.tensor(values, device=DEVICE))
    del tensors
