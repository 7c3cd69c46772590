"""WebDataset shards: USTAR archives whose bytes depend on their samples alone, and DALI's index of each."""

from __future__ import annotations

import tarfile
from pathlib import Path
from types import TracebackType
from typing import Self

import xxhash

_BLOCK = tarfile.BLOCKSIZE  # 512: members begin at multiples of it
_RECORD = tarfile.RECORDSIZE  # 10240: an archive's size is a multiple of it


class ShardWriter:
    """Writes samples as adjacent `KEY.jpg` and `KEY.cls` members; no date, owner or path enters the file.

    `digest` (xxh3_128, hex) and `num_bytes` describe the archive once it is closed.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._hash = xxhash.xxh3_128()
        self._lines: list[str] = []
        self.num_bytes = 0

    def add(self, key: int, jpeg: bytes, label: int) -> int:
        """Append one sample; returns the offset of the JPEG's data in the archive, in bytes."""
        name, cls = f"{key:08d}", str(label).encode()
        jpg_offset = self._member(f"{name}.jpg", jpeg)
        cls_offset = self._member(f"{name}.cls", cls)
        self._lines.append(f"jpg {jpg_offset} {len(jpeg)} {name}.jpg cls {cls_offset} {len(cls)} {name}.cls\n")
        return jpg_offset

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    @property
    def index(self) -> bytes:
        """DALI's index of this archive, format v1.2: a line a sample of (extension, offset, size, name)."""
        return "".join([f"v1.2 {len(self._lines)}\n", *self._lines]).encode()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                end = self.num_bytes + 2 * _BLOCK
                self._write(bytes(2 * _BLOCK + -end % _RECORD))

    def _member(self, name: str, data: bytes) -> int:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self.num_bytes
        self._write(data)
        self._write(bytes(-len(data) % _BLOCK))
        return offset

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.num_bytes += len(data)
