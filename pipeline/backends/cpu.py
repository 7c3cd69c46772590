"""Views on the CPU, exactly torchvision's: libjpeg-turbo, then Numba kernels, in threads without the GIL."""

import threading

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipeline.backends import BackendContext
from pipeline.backends.pool import ThreadedBackend
from pipeline.kernels.render import render
from pipeline.kernels.resample import Pixels, as_pixels


class Decoder:
    """Decodes into memory of each thread's own: an image is valid until its thread's next."""

    def __init__(self) -> None:
        self._local = threading.local()

    def __call__(self, data: NDArray[np.uint8], height: int, width: int) -> Pixels:
        """Raises ValueError for anything but a whole, clean JPEG of the given size."""
        memory = self._buffer(3 * height * width + 1)
        image = simplejpeg.decode_jpeg(data, buffer=memory[:-1])
        if image.shape[:2] != (height, width):
            raise ValueError(f"expected {height} x {width} pixels as the index says, found {image.shape[:2]}")
        return as_pixels(memory, height, width)

    def _buffer(self, size: int) -> NDArray[np.uint8]:
        """Grown to the largest image seen."""
        if getattr(self._local, "buffer", np.empty(0)).size < size:
            self._local.buffer = np.empty(size, np.uint8)
        return self._local.buffer[:size]


def build(context: BackendContext) -> ThreadedBackend[Pixels]:
    return ThreadedBackend(context, Decoder(), render)
