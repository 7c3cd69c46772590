"""What a JPEG file says about itself before any pixel is decoded: frame type, size, EXIF orientation.

Marker codes are those of ITU-T T.81, table B.1. Of EXIF, PIL reads what it can.
"""

import re
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

SOI, EOI = b"\xff\xd8", b"\xff\xd9"
BASELINE, PROGRESSIVE = 0xC0, 0xC2
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOFn: not DHT, JPG, DAC
_STANDALONE = frozenset(range(0xD0, 0xD8)) | {0x01, 0xD8}  # markers without a length
_APP1, _SOS, _EOI = 0xE1, 0xDA, 0xD9
_EXIF = b"Exif\x00\x00"
_ORIENTATION_TAG = 0x0112
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # after coded data, in which 0xFF is stuffed or a restart
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=[\"']|>)\s*([0-9])")


class JpegError(ValueError):
    """The file's structure is not that of a JPEG."""


@dataclass(frozen=True)
class JpegHeader:
    """Pixels are as stored: orientation is not applied to ``height`` and ``width``."""

    frame: int  # SOFn marker code
    precision: int  # bits a sample
    height: int
    width: int
    num_components: int
    orientation: int  # 1 to 8; 1 when nothing (readable) is said
    bad_exif: tuple[tuple[int, int], ...]  # [start, end) of EXIF segments if readers may disagree about them


def read_header(data: bytes) -> JpegHeader:
    """Walk the segments before the first scan. Raises JpegError where there is no frame header before it."""
    frame: tuple[int, int, int, int, int] | None = None
    exif: list[tuple[int, int]] = []
    xmp = 1
    for marker, start, end in _segments(data):
        if marker == _SOS:
            break
        if marker in _FRAMES:
            frame = (marker, *_frame_fields(data[start + 4 : end]))
        elif marker == _APP1 and data.startswith(_EXIF, start + 4):
            exif.append((start, end))
        elif marker == _APP1 and (found := _XMP_ORIENTATION.search(data, start, end)):
            xmp = int(found[1])
    if frame is None:
        raise JpegError("the JPEG has no frame header before its first scan")
    orientation, bad_exif = _resolve_orientation(data, exif, xmp)
    return JpegHeader(*frame, orientation, bad_exif)


def lacks_scans(data: bytes) -> bool:
    """Whether a progressive JPEG leaves coefficients unknown or inexact.

    libjpeg guesses them from the neighbouring blocks, and differently where only a part of the image is decoded.
    Raises JpegError when the segments cannot be followed to the end.
    """
    exact: dict[int, set[int]] = {}  # by component, the coefficients that are known to the last bit
    for marker, start, end in _segments(data):
        if marker in _FRAMES:
            exact = {component: set() for component in data[start + 10 : end : 3]}
        elif marker == _SOS:
            first, last, missing_bits = data[end - 3], data[end - 2], data[end - 1] & 15
            for component in data[start + 5 : end - 3 : 2]:
                exact.setdefault(component, set()).update(() if missing_bits else range(first, last + 1))
    return any(len(coefficients) < 64 for coefficients in exact.values())


def strip(data: bytes, ranges: tuple[tuple[int, int], ...]) -> bytes:
    """Cut byte ranges out. Removing a whole APPn segment leaves every pixel as it was."""
    kept, position = [], 0
    for start, end in ranges:
        kept.append(data[position:start])
        position = end
    return b"".join([*kept, data[position:]])


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start of its 0xFF, end of the segment) of all segments, with those of the scans."""
    if not data.startswith(SOI):
        raise JpegError("the file does not begin as a JPEG does")
    position = 2
    while position + 2 <= len(data):
        if data[position] != 0xFF:
            raise JpegError(f"no JPEG marker at byte {position}")
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == _EOI:
            return
        if marker in _STANDALONE:
            position += 2
            continue
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if end < position + 4 or end > len(data):
            raise JpegError(f"the JPEG segment at byte {position} ends past the file")
        yield marker, position, end
        position = end
        if marker == _SOS and (coded := _NEXT_MARKER.search(data, end)):
            position = coded.start()
    raise JpegError("the JPEG ends without its end marker")


def _frame_fields(body: bytes) -> tuple[int, int, int, int]:
    if len(body) < 6:
        raise JpegError("the JPEG's frame header is cut short")
    return struct.unpack(">BHHB", body[:6])


def _resolve_orientation(data: bytes, exif: list[tuple[int, int]], xmp: int) -> tuple[int, tuple[tuple[int, int], ...]]:
    """The first readable EXIF orientation, else XMP's; and the EXIF segments unless there is one that is sound."""
    found = [_exif_orientation(data[start + 4 : end]) for start, end in exif]
    said = [value for value in [*found, xmp] if value in range(1, 9)]
    return said[0] if said else 1, tuple(exif) if len(found) > 1 or 0 in found else ()


def _exif_orientation(segment: bytes) -> int:
    """1 when nothing is said, 0 when the segment is broken or says what means nothing."""
    exif = Image.Exif()
    try:
        with warnings.catch_warnings(action="error"):  # what PIL warns of, other readers may read differently
            exif.load(segment)
            orientation = exif.get(_ORIENTATION_TAG, 1)
    except Exception:  # broken segments provoke SyntaxError, struct.error, UserWarning ...
        return 0
    return orientation if orientation in range(1, 9) else 0
