"""Views on the CPU, exactly torchvision's: libjpeg-turbo, then Numba kernels, in threads without the GIL.

Decode-free shards need no libjpeg: of their planes a kernel converts what the views need.
"""

import threading

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipeline.backends import BackendContext
from pipeline.backends.pool import ThreadedBackend
from pipeline.kernels.planes import fill
from pipeline.kernels.render import render
from pipeline.kernels.resample import Pixels, as_pixels
from pipeline.plan import Ints
from sharding.planes import split_planes


class _Memory(threading.local):
    """Of each thread its own; an image there is valid until the thread's next."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)

    def _take(self, size: int) -> NDArray[np.uint8]:
        """Grown to the largest image seen."""
        if self._buffer.size < size:
            self._buffer = np.empty(size, np.uint8)
        return self._buffer[:size]


class Decoder(_Memory):
    """JPEGs, whole."""

    def __call__(self, data: NDArray[np.uint8], height: int, width: int, *_: Ints) -> Pixels:
        """Raises ValueError for anything but a whole, clean JPEG of the given size."""
        memory = self._take(3 * height * width + 1)
        image = simplejpeg.decode_jpeg(data, buffer=memory[:-1])
        if image.shape[:2] != (height, width):
            raise ValueError(f"expected {height} x {width} pixels as the index says, found {image.shape[:2]}")
        return as_pixels(memory, height, width)


class Converter(_Memory):
    """Planes, of which it converts a region (top, left, height, width); the pixels around it mean nothing."""

    def __call__(self, data: NDArray[np.uint8], height: int, width: int, region: Ints) -> Pixels:
        """Raises ValueError for anything but a frame of the given size."""
        planes = split_planes(data, height, width)
        # A column more, so that the kernels are not compiled again for arrays without gaps.
        image = self._take(4 * height * (width + 1)).view(np.int32).reshape(height, width + 1)
        fill(*planes, region, image)
        return image.view(np.uint32)[:, :width]


def build(context: BackendContext) -> ThreadedBackend[Pixels]:
    decode = Converter() if context.reader.shards.manifest.is_decode_free else Decoder()
    return ThreadedBackend(context, decode, render)
