from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from sharding.encode import BadImageError, Policy, encode
from sharding.jpeg import BASELINE, EOI, read_header
from tests.sharding.conftest import encoded, jpeg, picture
from tests.sharding.test_jpeg import exif_segment, with_segment, without_last_scans


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


@pytest.mark.parametrize(
    "data",
    [
        jpeg(1),
        jpeg(2, progressive=True),
        jpeg(3, subsampling=2),
        encoded(picture(4).convert("L")),
        with_segment(jpeg(5), exif_segment(1)),
    ],
    ids=["baseline", "progressive", "4:2:0", "grey", "upright exif"],
)
def test_sound_jpegs_keep_their_bytes(data: bytes) -> None:
    result = encode(data, Policy())
    assert result.data is data or result.data == data
    assert (result.height, result.width, result.change) == (48, 64, "")


@pytest.mark.parametrize("orientation", range(2, 9))
def test_orientation_is_applied_and_no_tag_remains(orientation: int) -> None:
    data = with_segment(jpeg(1), exif_segment(orientation))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))).astype(int)
    result = encode(data, Policy())
    assert result.change == "orientation applied"
    assert (result.height, result.width) == upright.shape[:2]
    assert read_header(result.data).orientation == 1
    assert Image.open(io.BytesIO(result.data)).getexif().get(0x0112, 1) == 1
    assert np.abs(decoded(result.data) - upright).mean() < 1.5


def test_orientation_out_of_range_is_removed_without_touching_pixels() -> None:
    data = with_segment(jpeg(1), exif_segment(0))
    result = encode(data, Policy())
    assert (result.data, result.change) == (jpeg(1), "broken EXIF removed")


@pytest.mark.parametrize(
    ("image", "format"),
    [
        (picture(1), "PNG"),
        (picture(1), "WEBP"),
        (picture(1).quantize(256), "GIF"),
        (picture(1), "BMP"),
        (picture(1), "TIFF"),
        (picture(1).convert("CMYK"), "JPEG"),
        (picture(1).convert("L"), "PNG"),
    ],
    ids=["png", "webp", "gif", "bmp", "tiff", "cmyk", "grey png"],
)
def test_other_formats_become_jpegs_that_look_the_same(image: Image.Image, format: str) -> None:  # noqa: A002
    data = encoded(image, format)
    result = encode(data, Policy())
    header = read_header(result.data)
    assert (header.height, header.width) == (result.height, result.width) == (48, 64)
    assert header.num_components == (1 if image.mode == "L" else 3)
    assert np.abs(decoded(result.data) - decoded(data)).mean() < 2
    assert result.change


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(format: str) -> None:  # noqa: A002
    ramp = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    result = encode(encoded(Image.fromarray(ramp), format), Policy())
    assert np.abs(decoded(result.data)[..., 0] - ramp / 257).mean() < 1.5


def test_progressive_jpegs_without_their_last_scans_are_reencoded_as_they_look() -> None:
    data = without_last_scans(jpeg(1, progressive=True), 4)
    result = encode(data, Policy())
    assert result.change == "scans missing"
    assert read_header(result.data).frame == BASELINE
    assert np.abs(decoded(result.data) - decoded(data)).mean() < 2


def rare_sampling() -> bytes:
    """A grey 24 x 8 image whose first component has three blocks for one of the others (``cjpeg -sample 3x1``)."""
    data = bytearray(encoded(Image.new("RGB", (16, 16), (128, 128, 128)), subsampling=0))
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    data[frame + 5 : frame + 9], data[frame + 11] = struct.pack(">HH", 8, 24), 0x31
    bits = "001010" * 3 + "0000" * 2 + "111111"  # DC and AC codes of empty blocks, Y Y Y Cb Cr, and padding
    return bytes(data[: scan + 14]) + int(bits, 2).to_bytes(4, "big") + EOI


def test_rare_chroma_sampling_is_converted() -> None:
    result = encode(rare_sampling(), Policy())
    assert (result.height, result.width, result.change) == (8, 24, "rare chroma sampling")
    assert np.abs(decoded(result.data) - 128).max() <= 1


def test_truncated_jpegs_are_kept_on_request() -> None:
    policy = Policy(keep_truncated=True)
    data = with_segment(jpeg(1), exif_segment(3))
    for lost, difference in ((1, 2), (2, 2), (40, 20)):
        result = encode(data[:-lost], policy)
        assert (result.height, result.width, result.change) == (48, 64, "truncated")
        assert encode(result.data, Policy()).change == ""
        assert np.abs(decoded(result.data) - decoded(jpeg(1))[::-1, ::-1]).mean() < difference
    assert encode(jpeg(1), policy).change == ""


def test_transparent_pixels_show_white() -> None:
    image = picture(1).convert("RGBA")
    image.putalpha(0)
    result = encode(encoded(image, "PNG"), Policy())
    assert decoded(result.data).min() >= 253


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>404</html>", "not an image"),
        (bytes(1000), "not an image"),
        (jpeg(1)[: len(jpeg(1)) * 3 // 4], "Premature end"),
        (jpeg(1)[:-40], "Premature end"),
        (jpeg(1)[:-2], "Premature end"),
        (jpeg(1, progressive=True)[:-20], "Premature end"),
        (encoded(picture(1), "PNG")[:-60], "(?i)truncated"),
        (jpeg(1)[:120], "ends past"),
        (encoded(Image.fromarray(np.eye(8, dtype=np.float32)), "TIFF"), "TIFF of 32-bit floats: no agreed range"),
        (encoded(Image.fromarray(np.eye(8, dtype=np.int32)), "TIFF"), "TIFF of 32-bit integers: no agreed range"),
        (encoded(picture(1), "AVIF"), "format not supported: AVIF"),
        (encoded(picture(1), "ICO"), "format not supported: ICO"),
    ],
    ids=[
        *["empty", "html", "zeros", "half", "last rows", "end mark", "progressive", "png", "header only"],
        *["float", "32 bits", "avif", "ico"],
    ],
)
def test_unusable_images_are_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImageError, match=reason):
        encode(data, Policy())


def test_a_broken_png_data_chunk_is_refused() -> None:
    data = bytearray(encoded(picture(1), "PNG"))
    start = data.index(b"IDAT") + 40
    data[start : start + 20] = bytes(20)
    with pytest.raises(BadImageError):
        encode(bytes(data), Policy())


def test_decompression_bombs_are_refused_from_their_header() -> None:
    """Also those beyond PIL's own limit, and before any pixel is decoded: this one would take 7.5 GB."""
    bomb = bytearray(encoded(picture(1), "PNG"))
    bomb[16:24] = struct.pack(">II", 50_000, 50_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    with pytest.raises(BadImageError, match="too large: 50000 x 50000 pixels exceed --max-pixels 89478485"):
        encode(bytes(bomb), Policy())
    with pytest.raises(BadImageError, match="--max-pixels 1000"):
        encode(jpeg(1), Policy(max_pixels=1000))


def test_short_side_makes_large_images_smaller_and_leaves_small_ones() -> None:
    data = encoded(picture(1, 300, 450), quality=100)
    result = encode(data, Policy(short_side=100))
    assert (result.height, result.width, result.change) == (100, 150, "resized")
    assert len(result.data) < len(data) / 3
    assert decoded(result.data).shape == (100, 150, 3)
    small = encode(jpeg(1, quality=60), Policy(short_side=100))
    assert (small.data, small.change) == (jpeg(1, quality=60), "")
    wasteful = encode(jpeg(1, quality=100, subsampling=0), Policy(short_side=100))
    assert (wasteful.height, wasteful.width, wasteful.change) == (48, 64, "re-encoded")
    assert len(wasteful.data) < len(jpeg(1, quality=100, subsampling=0))
    grey = encode(encoded(picture(1, 300, 450).convert("L")), Policy(short_side=100))
    assert read_header(grey.data).num_components == 1


def test_scaled_check_finds_what_a_full_strict_decode_finds() -> None:
    noise = random.Random(0)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 80, 3)).astype(np.uint8)
    for progressive in (False, True):
        sound = encoded(Image.fromarray(pixels), quality=80, progressive=progressive)
        for _ in range(150):
            data = bytearray(sound)
            for _ in range(noise.randint(1, 3)):
                data[noise.randrange(700, len(data))] = noise.randrange(256)
            assert _complaint(bytes(data), 1) == _complaint(bytes(data), 8)


def _complaint(data: bytes, factor: float) -> str:
    try:
        simplejpeg.decode_jpeg(data, min_height=1, min_width=1, min_factor=factor)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("segment", [b"", exif_segment(6)], ids=["upright", "rotated"])
def test_damage_that_pil_overlooks_is_found(segment: bytes) -> None:
    """Lost synchronisation in the middle decodes to garbage without an error in PIL."""
    pixels = np.random.default_rng(1).integers(0, 256, (64, 80, 3)).astype(np.uint8)
    data = bytearray(encoded(Image.fromarray(pixels)))
    del data[len(data) // 2 : len(data) // 2 + 7]
    data[-2:-2] = data[-400:-2]
    broken = with_segment(bytes(data), segment) if segment else bytes(data)
    Image.open(io.BytesIO(broken)).load()
    with pytest.raises(BadImageError, match="Corrupt JPEG data"):
        encode(broken, Policy())
