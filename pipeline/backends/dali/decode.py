"""NVIDIA DALI as a decoder: encoded bytes in our own order in, RGB images out, on the CPU or on a GPU.

DALI's graph ends at the decoded image, because its own resize, jitter and hue differ from torchvision's.
"""

from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline, pipeline_def

from pipeline.plan import Ints
from sharding.manifest import Index

Encoded = NDArray[np.uint8]
Size = tuple[int, int]  # height, width


@pipeline_def
def decode_graph(on_gpu: bool, largest: Size) -> Any:
    """Encoded bytes to RGB, once, as Pillow decodes them: exact chroma upsampling, orientation as stored.

    The CPU decodes no more than the region that the views need; damage outside of it, which would make batches depend
    on their crops, is the reader's to find. The GPU decodes all: a region there bypasses the hardware decoder
    (NVIDIA/DALI#2175) and crashes with nvImageCodec 0.9 (NVIDIA/nvImageCodec#55). Where there is a hardware decoder it
    takes every image that it can: shared out by load, an image's decoder, and with it perhaps its pixels, would depend
    on its place in the batch. It is told of the ``largest`` image, because decoding halts while it takes more memory.
    """
    encoded = fn.external_source(name="encoded", no_copy=True, dtype=types.DALIDataType.UINT8, ndim=1)
    how: dict[str, Any] = {"output_type": types.DALIImageType.RGB, "adjust_orientation": False}
    if on_gpu:
        how |= {"preallocate_height_hint": largest[0], "preallocate_width_hint": largest[1]}
        return fn.decoders.image(encoded, device="mixed", jpeg_fancy_upsampling=True, hw_decoder_load=1.0, **how)
    start = fn.external_source(name="start", dtype=types.DALIDataType.INT32, ndim=1)
    shape = fn.external_source(name="shape", dtype=types.DALIDataType.INT32, ndim=1)
    return fn.decoders.image_slice(encoded, start=start, shape=shape, axes=(0, 1), **how)


class Decoder:
    """A DALI pipeline: batches go in and come out in the same order. One failure and it is of no more use."""

    def __init__(self, batch_size: int, num_threads: int, device_id: int | None, largest: Size) -> None:
        self._on_gpu = device_id is not None
        # The dynamic executor queues any number of runs; the depth is only how many runs the first one starts.
        self._pipeline: Pipeline = decode_graph(
            self._on_gpu,
            largest,
            batch_size=batch_size,
            num_threads=num_threads,
            device_id=device_id,
            prefetch_queue_depth=1,
        )
        self._pipeline.build()

    def schedule(self, encoded: list[Encoded], regions: Ints) -> None:
        """Start decoding the ``regions`` (n, 4), on a GPU whole images. ``encoded`` is not copied: it must live until
        `collect` has returned its images."""
        self._pipeline.feed_input("encoded", encoded)
        if not self._on_gpu:
            self._pipeline.feed_input("start", regions[:, :2].astype(np.int32))
            self._pipeline.feed_input("shape", regions[:, 2:].astype(np.int32))
        self._pipeline.schedule_run()

    def collect(self, stream: Any) -> Any:
        """The next batch of images, for ``stream`` (None: the host) to read. Their memory serves others as soon as
        nothing refers to them, even if a stream has yet to read it. Raises RuntimeError."""
        (images,) = self._pipeline.share_outputs(stream)
        self._pipeline.release_outputs()
        return images

    def close(self) -> None:
        """Ends DALI's threads."""
        del self._pipeline


def largest_size(index: Index) -> Size:
    """The greatest height and the greatest width of the images, which may be those of different ones."""
    return int(index.height.max()), int(index.width.max())


def find_fault(decoder: Decoder, data: Encoded, height: int, width: int) -> str:
    """Why an image cannot be decoded, "" if it can; a decoder of single images, which is used up if not.

    The reason is what libjpeg has to say, where it says something: DALI's is a number.
    """
    try:
        decoder.schedule([data], np.array([[0, 0, height, width]]))
        decoder.collect(None)
    except RuntimeError as error:
        try:
            simplejpeg.decode_jpeg(data)
        except ValueError as complaint:
            return str(complaint)
        return str(error)
    return ""
