from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from sharding.jpeg import BASELINE, EOI, PROGRESSIVE, JpegError, _segments, lacks_scans, read_header, strip
from tests.sharding.conftest import encoded, jpeg, picture


def exif_segment(orientation: int, kind: int = 3, order: str = "<") -> bytes:
    """An APP1 segment with one TIFF entry."""
    magic = b"II*\x00" if order == "<" else b"MM\x00*"
    value = struct.pack(order + "HH", orientation, 0) if kind == 3 else struct.pack(order + "I", orientation)
    tiff = magic + struct.pack(order + "IHHHI", 8, 1, 0x0112, kind, 1) + value + bytes(4)
    body = b"Exif\x00\x00" + tiff
    return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body


def with_segment(data: bytes, segment: bytes) -> bytes:
    return data[:2] + segment + data[2:]


def test_header_of_baseline_and_progressive() -> None:
    header = read_header(jpeg(1))
    assert (header.frame, header.precision, header.height, header.width) == (BASELINE, 8, 48, 64)
    assert (header.num_components, header.orientation, header.bad_exif) == (3, 1, ())
    assert read_header(jpeg(1, progressive=True)).frame == PROGRESSIVE
    assert read_header(encoded(picture(1).convert("L"))).num_components == 1
    assert read_header(encoded(picture(1).convert("CMYK"))).num_components == 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", [3, 4])
@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_is_read_as_pil_reads_it(orientation: int, kind: int, order: str) -> None:
    data = with_segment(jpeg(1), exif_segment(orientation, kind, order))
    assert Image.open(io.BytesIO(data)).getexif()[0x0112] == orientation
    assert read_header(data).orientation == orientation
    assert read_header(data).bad_exif == ()


def test_orientation_from_xmp_counts_as_pil_counts_it() -> None:
    body = b'http://ns.adobe.com/xap/1.0/\x00<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    data = with_segment(jpeg(1), b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body)
    assert Image.open(io.BytesIO(data)).getexif()[0x0112] == 8
    assert read_header(data).orientation == 8


@pytest.mark.parametrize(
    "segment",
    [
        exif_segment(0),
        exif_segment(9),
        exif_segment(1)[:10] + b"XXXX" + exif_segment(1)[14:],
        exif_segment(1)[:14] + b"\xff\xff\xff\x7f" + exif_segment(1)[18:],
    ],
    ids=["zero", "nine", "magic", "offset"],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_is_marked_and_stripping_it_keeps_every_pixel(segment: bytes) -> None:
    data = with_segment(jpeg(1), segment)
    header = read_header(data)
    assert header.orientation == 1
    stripped = strip(data, header.bad_exif)
    assert stripped == jpeg(1)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(stripped))), np.asarray(Image.open(io.BytesIO(data))))


def test_only_the_first_of_two_exif_segments_counts_and_neither_is_kept() -> None:
    data = with_segment(with_segment(jpeg(1), exif_segment(3)), exif_segment(6))
    header = read_header(data)
    assert header.orientation == 6
    assert strip(data, header.bad_exif) == jpeg(1)


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\xff\xd8", jpeg(1)[:100], b"\xff\xd8\x00\x00\x00\x00"])
def test_what_is_no_jpeg_is_refused(data: bytes) -> None:
    with pytest.raises(JpegError):
        read_header(data)


def without_last_scans(data: bytes, count: int) -> bytes:
    """A progressive JPEG that ends after its first ``count`` scans."""
    starts = [start for marker, start, _ in _segments(data) if marker == 0xDA]
    return data[: starts[count]] + EOI if count < len(starts) else data


def test_missing_scans_of_a_progressive_jpeg_are_noticed() -> None:
    data = with_segment(jpeg(1, progressive=True), b"\xff\xe2\x00\x06\xff\xda\x00\x08")
    assert [lacks_scans(without_last_scans(data, count)) for count in range(1, 12)] == [True] * 9 + [False] * 2
    assert not lacks_scans(jpeg(1))
    assert not lacks_scans(encoded(picture(1).convert("L"), progressive=True))


def test_no_prefix_of_a_jpeg_crashes_the_reader() -> None:
    data = with_segment(jpeg(1), exif_segment(6))
    for end in range(len(data)):
        try:
            read_header(data[:end])
        except JpegError:
            continue
