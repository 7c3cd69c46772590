"""One source image into the bytes that a shard holds: kept, converted, or refused with a reason.

Whatever passes decodes alike in every backend: an upright 8-bit baseline or progressive JPEG, grey or
three components, whose every coded block has been decoded once; or the planes of an image, see `sharding.planes`.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from sharding.jpeg import BASELINE, EOI, PROGRESSIVE, SOI, JpegError, JpegHeader, lacks_scans, read_header, strip
from sharding.planes import encode_planes

_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")
_UNSUPPORTED = {"AVIF": (4, b"ftypavi"), "HEIC": (4, b"ftyphe"), "ICO": (0, b"\0\0\1\0"), "PSD": (0, b"8BPS")}
_UNSUPPORTED |= {"planes of decode-free shards": (0, b"YUV4MPEG2")}
_RARE_SAMPLING = "Could not determine subsampling level"  # of TurboJPEG; libjpeg and so PIL knows all there are


class BadImageError(ValueError):
    """The image cannot be used; the message is the reason that ``quarantine.jsonl`` gives."""


@dataclass(frozen=True)
class Policy:
    """What happens to every image. Recorded in the manifest: it decides the bytes."""

    short_side: int | None = None  # re-encode: larger images to this many pixels, others if that saves bytes
    quality: int = 90  # JPEG quality with short_side
    convert_quality: int = 95  # JPEG quality, without chroma subsampling, of images that must be converted
    max_pixels: int = 89_478_485  # height times width; more is a decompression bomb (PIL's own limit)
    orientation: str = "upright"  # EXIF and XMP orientation is applied to the pixels, and no tag remains
    alpha: str = "white"  # what shines through transparent pixels
    keep_truncated: bool | None = None  # JPEGs that end early are re-encoded, and grey where nothing is left
    decode_free: bool | None = None  # planes of 4:2:0 instead of JPEGs, of all images


@dataclass(frozen=True)
class Encoded:
    """``height`` and ``width`` as decoded; ``change`` is "" when the bytes are the source's own."""

    data: bytes
    height: int
    width: int
    change: str


def encode(data: bytes, policy: Policy) -> Encoded:
    """Check one image fully and bring it into the form that the shards promise.

    Raises BadImageError: empty, not an image, truncated, damaged, or larger than ``policy.max_pixels``.
    """
    if not data:
        raise BadImageError("empty: 0 bytes")
    if not data.startswith(SOI):
        return _convert(data, policy, change="")
    try:
        return _encode_jpeg(data, read_header(data), policy)
    except JpegError as error:
        raise BadImageError(str(error)) from None


def _encode_jpeg(data: bytes, header: JpegHeader, policy: Policy) -> Encoded:
    _check_pixels(header.height, header.width, policy)
    complaint = _complaint(data)
    if _RARE_SAMPLING in complaint:
        return _convert(data, policy, "rare chroma sampling")
    if policy.keep_truncated and complaint.startswith("Premature end"):
        return _convert(data + EOI, policy, "truncated")
    if complaint:
        raise BadImageError(complaint)
    if change := _must_convert(header, data):
        return _convert(data, policy, change)
    if policy.short_side is not None:
        larger = min(header.height, header.width) > policy.short_side
        encoded = _reencode(_decode(data, header), policy, "resized" if larger else "re-encoded")
        if larger or policy.decode_free or len(encoded.data) < len(data):
            return encoded
    change = "broken EXIF removed" if header.bad_exif else ""
    return Encoded(strip(data, header.bad_exif), header.height, header.width, change)


def _must_convert(header: JpegHeader, data: bytes) -> str:
    """Why this JPEG cannot stay as it is, or ""."""
    if header.orientation != 1:
        return "orientation applied"
    if header.num_components not in (1, 3):
        return "CMYK to RGB"
    if header.frame not in (BASELINE, PROGRESSIVE) or header.precision != 8:
        return "unusual JPEG process"
    if header.frame == PROGRESSIVE and lacks_scans(data):
        return "scans missing"
    return ""


def _complaint(data: bytes) -> str:
    """What libjpeg-turbo has to say against any block of a JPEG; PIL would pass lost synchronisation over in silence.

    At 1/8 scale only the inverse DCT, which cannot fail, is left out: the same verdict for a third less time.
    JPEG has no checksum, so a changed byte can still pass as a different picture.
    """
    try:
        simplejpeg.decode_jpeg(data, min_height=1, min_width=1, min_factor=8)
    except ValueError as error:
        return str(error)
    return ""


def _decode(data: bytes, header: JpegHeader) -> NDArray[np.uint8]:
    """``(H, W, 3)``, or ``(H, W)`` of a grey image."""
    if header.num_components == 1:
        return simplejpeg.decode_jpeg(data, "GRAY")[..., 0]
    return simplejpeg.decode_jpeg(data)


def _convert(data: bytes, policy: Policy, change: str) -> Encoded:
    """Decode with PIL, turn upright, drop alpha and depth, and encode as JPEG."""
    try:
        with _without_pils_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on metadata
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                _check_pixels(image.height, image.width, policy)
                image.verify()  # checksums, which load() does not look at
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                image.load()
                _check_range(image)
                change = change or f"{image.format} {image.mode} to JPEG"
                pixels = np.asarray(_to_grey_or_rgb(ImageOps.exif_transpose(image)))
    except BadImageError:
        raise
    except Exception as error:  # broken files provoke OSError, SyntaxError, struct.error ...
        raise BadImageError(_describe(error, data)) from None
    return _reencode(pixels, policy, change)


@contextlib.contextmanager
def _without_pils_limit() -> Iterator[None]:
    """PIL refuses large images on opening them; `Policy.max_pixels` decides instead, before pixels are decoded."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _check_range(image: Image.Image) -> None:
    """PIL has floats as mode F, and 32 bits as mode I, as which it also has the 16 bits of PGM."""
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        kind = "floats" if image.mode == "F" else "integers"
        raise BadImageError(f"{image.format} of 32-bit {kind}: no agreed range")


def _to_grey_or_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("1", "L"):
        return image.convert("L")
    if image.mode.startswith("I"):  # 16 bits, whatever container PIL chose
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _reencode(pixels: NDArray[np.uint8], policy: Policy, change: str) -> Encoded:
    """Encode ``(H, W)`` or ``(H, W, 3)`` pixels, made smaller first when the policy asks for it."""
    quality, subsampling = policy.convert_quality, "444"
    if policy.short_side is not None:
        quality, subsampling = policy.quality, "420"
        pixels = _shrink(pixels, policy.short_side)
    if policy.decode_free:
        return Encoded(encode_planes(pixels), pixels.shape[0], pixels.shape[1], change)
    colorspace = "RGB" if pixels.ndim == 3 else "GRAY"
    pixels = np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], -1))
    data = simplejpeg.encode_jpeg(pixels, quality, colorspace, subsampling)
    return Encoded(data, pixels.shape[0], pixels.shape[1], change)


def _shrink(pixels: NDArray[np.uint8], short_side: int) -> NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    scale = short_side / min(height, width)
    if scale >= 1:
        return pixels
    size = (max(short_side, round(width * scale)), max(short_side, round(height * scale)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _check_pixels(height: int, width: int, policy: Policy) -> None:
    if height * width > policy.max_pixels:
        raise BadImageError(f"too large: {width} x {height} pixels exceed --max-pixels {policy.max_pixels}")
    if height < 1 or width < 1:
        raise BadImageError(f"no pixels: {width} x {height}")


def _describe(error: Exception, data: bytes) -> str:
    if isinstance(error, UnidentifiedImageError):
        if found := next((name for name, (at, magic) in _UNSUPPORTED.items() if data.startswith(magic, at)), None):
            return f"format not supported: {found}"
        return f"not an image: begins with {data[:16]!r}"
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
