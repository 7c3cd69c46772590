"""Images without a codec: planar YCbCr 4:2:0 of a byte a sample, as one frame of YUV4MPEG2, which video tools read too.

Luma (h, w), then Cb and Cr (ceil(h / 2), ceil(w / 2)) of full range, placed as in a JPEG. What a frame shows is what
libjpeg-turbo would show of a JPEG whose coefficients give these very planes, to the bit.
"""

import io
import re

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Plane = NDArray[np.uint8]
Planes = tuple[Plane, Plane, Plane]

_HEADER = b"YUV4MPEG2 W%d H%d F25:1 Ip A1:1 C420jpeg XCOLORRANGE=FULL\nFRAME\n"
# JFIF's factors of R, G and B in 16-bit fixed point, as libjpeg rounds them
_LUMA, _CB, _CR = np.array([[19595, 38470, 7471], [-11059, -21709, 32768], [32768, -27439, -5329]], np.int32)
_SIZE = re.compile(rb"YUV4MPEG2 W(\d+) H(\d+) ")


def extension(is_decode_free: bool | None) -> str:
    """Of an archive's members that hold images."""
    return "y4m" if is_decode_free else "jpg"


def encode_planes(pixels: Plane) -> bytes:
    """A frame of (h, w) grey or (h, w, 3) RGB pixels: JFIF's YCbCr, rounded once; a chroma sample is that of the mean
    of 2 x 2 pixels, at an odd edge of those that there are. Grey stays exactly as it is."""
    rgb = (pixels if pixels.ndim == 3 else pixels[..., None].repeat(3, axis=-1)).astype(np.int32)
    height, width = rgb.shape[:2]
    even = np.pad(rgb, [(0, height % 2), (0, width % 2), (0, 0)], mode="edge")
    rows = even[::2] + even[1::2]
    fours = rows[:, ::2] + rows[:, 1::2]
    luma = (rgb @ _LUMA + (1 << 15)) >> 16
    chroma = [((fours @ factors + (1 << 17) - 1) >> 18) + 128 for factors in (_CB, _CR)]
    return b"".join([_HEADER % (width, height), *(plane.astype(np.uint8).tobytes() for plane in (luma, *chroma))])


def frame_size(data: bytes) -> tuple[int, int]:
    """Height and width, as the header says. Raises ValueError for anything but a frame of `encode_planes`."""
    if not (found := _SIZE.match(data)):
        raise ValueError(f"expected a frame of YUV4MPEG2, found {data[:16]!r}")
    width, height = map(int, found.groups())
    return height, width


def split_planes(data: Plane, height: int, width: int) -> Planes:
    """The planes of a frame, without a copy. Raises ValueError where ``data`` is no frame of this size."""
    header, half = _HEADER % (width, height), ((height + 1) // 2, (width + 1) // 2)
    num_bytes = len(header) + height * width + 2 * half[0] * half[1]
    if data.size != num_bytes or data[: len(header)].tobytes() != header:
        raise ValueError(
            f"expected {num_bytes} bytes of a frame of {height} x {width} pixels, found {data.size} that begin with "
            f"{data[:32].tobytes()!r}"
        )
    samples = data[len(header) :]
    cb, cr = samples[height * width :].reshape(2, *half)
    return samples[: height * width].reshape(height, width), cb, cr


def to_rgb(luma: Plane, cb: Plane, cr: Plane) -> Plane:
    """(h, w, 3), as libjpeg-turbo has it: "fancy" upsampling, then JFIF's conversion in 16-bit fixed point.

    The reference; `pipeline.kernels.planes` is the fast one.
    """
    height, width = luma.shape
    y = luma.astype(np.int32)
    u, v = (_upsample(plane.astype(np.int32))[:height, :width] - 128 for plane in (cb, cr))
    red = y + ((91881 * v + 32768) >> 16)
    green = y + ((-22554 * u - 46802 * v + 32768) >> 16)
    blue = y + ((116130 * u + 32768) >> 16)
    return np.stack([red, green, blue], axis=-1).clip(0, 255).astype(np.uint8)


def _upsample(plane: NDArray[np.int32]) -> NDArray[np.int32]:
    """Twice as high and wide: 3/4 of the nearer and 1/4 of the farther sample along each axis (`h2v2_fancy_upsample`).
    Of planes of one or two columns libjpeg repeats the samples."""
    if plane.shape[1] <= 2:
        return plane.repeat(2, axis=0).repeat(2, axis=1)
    rows = 3 * plane.repeat(2, axis=0) + _neighbours(plane)
    sums = 3 * rows.repeat(2, axis=1) + _neighbours(rows.T).T
    return (sums + np.tile([8, 7], plane.shape[1])) >> 4


def _neighbours(rows: NDArray[np.int32]) -> NDArray[np.int32]:
    """Of each row the one before and the one after, themselves at the edges."""
    before, after = np.concatenate([rows[:1], rows[:-1]]), np.concatenate([rows[1:], rows[-1:]])
    return np.stack([before, after], axis=1).reshape(-1, rows.shape[1])


def open_image(data: bytes) -> Image.Image:
    """A sample of any shard, decoded as RGB. Raises OSError or ValueError where that fails."""
    if not data.startswith(_HEADER[:9]):
        return Image.open(io.BytesIO(data)).convert("RGB")
    planes = split_planes(np.frombuffer(data, np.uint8), *frame_size(data))
    return Image.fromarray(to_rgb(*planes))
