"""WebDataset shards: USTAR archives whose bytes depend on their samples alone, and DALI's index of each."""

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import xxhash

from sharding.planes import extension

_BLOCK = tarfile.BLOCKSIZE  # 512: members begin at multiples of it
_RECORD = tarfile.RECORDSIZE  # 10240: an archive's size is a multiple of it


def index_text(entries: Sequence[str]) -> bytes:
    """DALI's index, format v1.2: a line a sample."""
    return "".join([f"v1.2 {len(entries)}\n", *entries]).encode()


def index_entry(suffix: str, key: int, offset: int, size: int, label: int) -> str:
    """(extension, offset, size, name) of a sample's two members, given where its image's data lie."""
    cls_offset = offset + size + -size % _BLOCK + _BLOCK
    return f"{suffix} {offset} {size} {key:08d}.{suffix} cls {cls_offset} {len(str(label))} {key:08d}.cls\n"


class ShardWriter:
    """Writes samples as adjacent ``KEY.jpg`` (decode-free: ``KEY.y4m``) and ``KEY.cls`` members; no date, owner or path
    enters the file.

    ``digest`` (xxh3_128, hex) and ``num_bytes`` describe the archive once it is closed.
    """

    def __init__(self, path: Path, is_decode_free: bool = False) -> None:
        self._extension = extension(is_decode_free)
        self._file = path.open("wb")
        self._hash = xxhash.xxh3_128()
        self._entries: list[str] = []
        self.num_bytes = 0

    def add(self, key: int, image: bytes, label: int) -> int:
        """Append one sample; returns the offset of the image's data in the archive, in bytes."""
        offset = self._member(f"{key:08d}.{self._extension}", image)
        self._member(f"{key:08d}.cls", str(label).encode())
        self._entries.append(index_entry(self._extension, key, offset, len(image), label))
        return offset

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    @property
    def index(self) -> bytes:
        """DALI's index of this archive."""
        return index_text(self._entries)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._file:
            if kind is None:
                end = self.num_bytes + 2 * _BLOCK
                self._write(bytes(2 * _BLOCK + -end % _RECORD))

    def _member(self, name: str, data: bytes) -> int:
        self._write(_header(name, len(data)))
        offset = self.num_bytes
        self._write(data)
        self._write(bytes(-len(data) % _BLOCK))
        return offset

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.num_bytes += len(data)


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT)
