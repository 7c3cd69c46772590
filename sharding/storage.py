"""A directory on a local disk or behind any fsspec URL, in which files appear whole or not at all."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import xxhash
from fsspec.implementations.local import LocalFileSystem

from sharding.command import UserError

_TEMPORARY = "tmp-"
STATE = ".build"  # everything unfinished lives below this name; it is gone from a finished directory


@dataclass(frozen=True)
class Directory:
    """``url`` is a local path or an fsspec URL (``s3://bucket/shards``); names are relative, with ``/``."""

    url: str

    @staticmethod
    def at(location: "str | Path | Directory") -> "Directory":
        return location if isinstance(location, Directory) else Directory(str(location).rstrip("/") or "/")

    def __str__(self) -> str:
        return self.url

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        return self._resolved()[0]

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """Path of ``name`` as the file system wants it (for a local directory: absolute)."""
        root = self._resolved()[1]
        return f"{root}/{name}" if name else root

    def local_path(self, name: str = "") -> Path:
        if not self.is_local:
            raise UserError(f"{self.url}: is not a local directory")
        return Path(self.path(name))

    def exists(self, name: str) -> bool:
        """Raises OSError when the store cannot be asked. Each has errors of its own for a network that is down or
        credentials that are missing; they show here, since this is the first that any command wants to know.
        """
        try:
            self.fs.info(self.path(name))  # `exists` of some takes every error for an answer
            return True
        except (FileNotFoundError, NotADirectoryError):
            return False
        except (OSError, ValueError, ImportError):
            raise
        except Exception as error:
            raise OSError(f"{self}: cannot be reached: {error}") from error

    def sizes(self) -> dict[str, int]:
        """Bytes of every file below this directory, by relative name. One listing, no file is opened.

        Raises UserError for a pipe, a socket or a device, which no one could read to the end.
        """
        if not self.exists(""):
            return {}
        root = self.path("")
        found = self.fs.find(root, detail=True)
        if special := [name for name, info in found.items() if info["type"] == "other"]:
            raise UserError(f"{special[0]}: is not a regular file; move it away")
        return {name[len(root) :].lstrip("/"): int(info["size"]) for name, info in found.items()}

    def sizes_of(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of those of these files that are there: on a disk without a listing, which takes far longer."""
        if not self.is_local:
            return self.sizes()
        found, root = {}, self.path("")
        for name in names:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                found[name] = os.stat(f"{root}/{name}").st_size  # noqa: PTH116 - a Path takes longer than the call
        return found

    def open(self, name: str) -> BinaryIO:
        return cast(BinaryIO, self.fs.open(self.path(name), "rb"))

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        return cast(bytes, self.fs.cat_file(self.path(name), start=start, end=end))

    def write(self, name: str, data: bytes) -> None:
        with self.publish(name) as path:
            path.write_bytes(data)

    @contextlib.contextmanager
    def publish(self, name: str) -> Iterator[Path]:
        """Yield a local path to write. When the block ends without an error the file appears as ``name``:
        renamed after an fsync on a local disk, in one upload elsewhere (object stores show whole objects).
        """
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=self._staging() if self.is_local else None) as staging:
            path = Path(staging) / Path(name).name
            yield path
            if self.is_local:
                rename_durably(path, self.local_path(name))
            else:
                self.fs.put_file(str(path), self.path(name))

    def rename(self, old: str, new: str) -> None:
        if self.is_local:
            rename_durably(self.local_path(old), self.local_path(new))
            return
        try:
            self.fs.mv(self.path(old), self.path(new))
        except NotImplementedError:  # the hub's buckets cannot copy (huggingface_hub 2.3)
            with self.publish(new) as path:
                self.fs.get_file(self.path(old), str(path))
            self.remove(old)

    def remove(self, name: str) -> None:
        self.fs.rm(self.path(name))

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second build out of a local directory, and clear what killed ones left half-written."""
        if not self.is_local:
            yield
            return
        file = locked(self._staging() / "lock", wait=False)
        if not file:
            raise UserError(f"{self}: another build is writing here; wait for it or stop it")
        with file:
            for leftover in self._staging().glob(f"{_TEMPORARY}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            yield

    def remove_state(self) -> None:
        """Delete everything unfinished."""
        if self.is_local:
            shutil.rmtree(self.local_path(STATE), ignore_errors=True)
        elif self.exists(STATE):
            self.fs.rm(self.path(STATE), recursive=True)

    def _staging(self) -> Path:
        """Where to write before publishing, on the same file system."""
        staging = self.local_path(STATE)
        staging.mkdir(parents=True, exist_ok=True)
        return staging

    def _resolved(self) -> tuple[fsspec.AbstractFileSystem, str]:
        fs, root = fsspec.core.url_to_fs(self.url)
        return fs, root.rstrip("/")


def locked(path: Path, wait: bool = True) -> Any:
    """A file that is locked until it is closed, here and in processes that inherit it; None if that had to wait."""
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return file.close()
    return file


def checksum(file: BinaryIO) -> str:
    """xxh3_128 of an open file, in hex, in bounded memory."""
    return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()  # type: ignore[arg-type]  # BinaryIO has readinto


def rename_durably(old: Path, new: Path) -> None:
    """``new`` is ``old``'s content, on the disk, or as it was before."""
    _fsync(old)
    new.parent.mkdir(parents=True, exist_ok=True)
    old.replace(new)
    _fsync(new.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
