"""What a finished shard directory holds: ``manifest.json``, and ``index.arrow`` with one row a sample.

The manifest is written last, so a directory that has one is complete.
"""

import json
import mmap
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError

from sharding.command import UserError, announced, say
from sharding.storage import STATE, Directory

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
MANIFEST_COPY = "manifest.copy.json"
INDEX_FILE = "index.arrow"
QUARANTINE_FILE = "quarantine.jsonl"
SAMPLE_SCHEMA = pa.schema(
    [
        pa.field("offset", pa.int64(), nullable=False),  # of the image's data in its archive, bytes
        pa.field("size", pa.int32(), nullable=False),  # of that, bytes
        pa.field("height", pa.int32(), nullable=False),  # as every backend decodes it
        pa.field("width", pa.int32(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),  # -1: none
        pa.field("source_row", pa.int64(), nullable=False),
        pa.field("xxh3_64", pa.uint64(), nullable=False),  # of the image's bytes
    ]
)
INDEX_SCHEMA = SAMPLE_SCHEMA.insert(0, pa.field("shard", pa.int32(), nullable=False))
MAPPED_BYTES = 4 << 30  # of an index; 97 million samples
_STRICT = ConfigDict(extra="forbid")


class ShardError(UserError):
    """Something is wrong with a shard directory; the message says where, what and what to do."""


@dataclass(frozen=True)
class Shard:
    __pydantic_config__: ClassVar = _STRICT

    path: str  # relative, "lane-00/train-000000.tar"; its DALI index has the suffix .idx
    lane: int
    num_samples: int
    num_bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class IndexFile:
    __pydantic_config__: ClassVar = _STRICT

    num_bytes: int
    xxh3_128: str
    path: str = INDEX_FILE


@dataclass(frozen=True)
class Manifest:
    """``num_read == num_samples + num_quarantined + num_surplus``; lanes are exactly equal."""

    __pydantic_config__: ClassVar = _STRICT

    version: int
    fingerprint: str  # of everything that decides order and content; not of paths, dates or library versions
    source: dict[str, Any]
    policy: dict[str, Any]
    layout: dict[str, Any]  # lanes, shard size and seed, as asked for
    num_read: int
    num_samples: int
    num_quarantined: int
    num_surplus: int
    surplus_rows: tuple[int, ...]  # sound images left out so that lanes are equal; fewer than one a lane
    changes: dict[str, int]  # images whose bytes are not the source's own, by what was done
    class_names: tuple[str, ...]  # by label; empty for unlabelled data
    shards: tuple[Shard, ...]  # by lane, then by number
    index: IndexFile
    libraries: dict[str, str]

    @property
    def num_lanes(self) -> int:
        """Slices of the data set; a rank reads whole ones."""
        return int(self.layout["lanes"])

    @property
    def is_decode_free(self) -> bool:
        """Whether samples are planes, see `sharding.planes`, and no JPEGs."""
        return bool(self.policy.get("decode_free"))

    @property
    def num_samples_per_lane(self) -> int:
        """All lanes have equally many."""
        return self.num_samples // self.num_lanes

    @classmethod
    def load(cls, root: str | Path | Directory) -> Self:
        """The manifest, or its copy where it is damaged or missing, which is said aloud.

        Raises ShardError for no manifest, an unfinished build, a different version, other fields, or a fingerprint that
        is not that of its shards.
        """
        out = Directory.at(root)
        try:
            with announced("sharding", f"{out}/{MANIFEST_FILE}"):
                return cls.read(out, MANIFEST_FILE)
        except ShardError:
            if not out.exists(MANIFEST_COPY):
                raise
            manifest = cls.read(out, MANIFEST_COPY)
            where = f"{out}/{MANIFEST_FILE}"
            say("sharding", f"{where}: is damaged or missing, its copy is used; {repair_command(out)} restores it")
            return manifest

    def save(self, root: str | Path | Directory) -> None:
        """Write it, whole or not at all. To be called last: a directory that has a manifest is complete."""
        for name in (MANIFEST_COPY, MANIFEST_FILE):
            Directory.at(root).write(name, (json.dumps(asdict(self), indent=1) + "\n").encode())

    @classmethod
    def read(cls, out: Directory, name: str) -> Self:
        """One of the two files, checked."""
        if not out.exists(name):
            raise ShardError(_why_no_manifest(out))
        where, data = f"{out}/{name}", out.read(name)
        try:
            raw = json.loads(data)
        except ValueError as error:
            raise ShardError(f"{where}: is not JSON ({error}); rebuild the shards") from None
        version = raw.get("version") if isinstance(raw, dict) else None
        if version != FORMAT_VERSION:
            raise ShardError(
                f"{where}: format version {version!r}, this program reads version {FORMAT_VERSION}; "
                "build the shards again with this program, or read them with the one that made them"
            )
        try:
            manifest = TypeAdapter(cls).validate_json(data, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise ShardError(
                f"{where}: is damaged at {field}: {first['msg']}, found {first['input']!r}; "
                "put the original back, or build the shards again"
            ) from None
        found = fingerprint(manifest.shards, manifest.num_lanes, manifest.policy, manifest.class_names)
        if found != manifest.fingerprint:
            raise ShardError(
                f"{where}: expected the fingerprint {manifest.fingerprint} of its build, its shards have {found}: "
                "it is damaged or was changed; put the original back, or build the shards again"
            )
        return manifest


@dataclass(frozen=True)
class Index:
    """Columns of ``index.arrow`` (44 bytes a sample); a sample's id is its row number.

    Rows are ordered by lane, shard, and position in the shard, so lane ``l`` owns ids ``[l * n, (l + 1) * n)``.
    """

    shard: NDArray[np.int32]  # row of `Manifest.shards`
    offset: NDArray[np.int64]  # of the image's data in its archive, bytes
    size: NDArray[np.int32]  # of that, bytes
    height: NDArray[np.int32]
    width: NDArray[np.int32]
    label: NDArray[np.int32]
    source_row: NDArray[np.int64]
    xxh3_64: NDArray[np.uint64]  # of the image's bytes

    def __len__(self) -> int:
        return len(self.shard)

    def rows_of(self, shard: int) -> range:
        """Sample ids of one shard of the manifest."""
        start, stop = np.searchsorted(self.shard, [shard, shard + 1])
        return range(int(start), int(stop))

    @classmethod
    def load(cls, root: str | Path | Directory, expected: IndexFile | None = None) -> Self:
        """Up to `MAPPED_BYTES` the file is read whole: what becomes of it on the disk later can neither change an order
        nor kill a process. A larger local one is mapped, takes no memory of a process, and is not compared with a
        checksum; `sharding.verify` does that.

        Raises ShardError when it cannot be read, or has not the checksum of the ``expected`` one.
        """
        out = Directory.at(root)
        where = f"{out}/{INDEX_FILE}"
        try:
            is_whole = not is_mapped(out)
            data = pa.py_buffer(out.read(INDEX_FILE) if is_whole else _map(out.local_path(INDEX_FILE)))
            if is_whole and expected and xxhash.xxh3_128_hexdigest(data) != expected.xxh3_128:
                raise ShardError(
                    f"{where}: is damaged: its checksum is not the manifest's; {repair_command(out)} restores it"
                )
            batch = pa.ipc.open_file(data).get_batch(0)
        except (OSError, pa.ArrowInvalid) as error:
            raise ShardError(f"{where}: cannot be read ({error}); rebuild or repair the shards") from None
        if not batch.schema.equals(INDEX_SCHEMA):
            raise ShardError(f"{where}: expected columns {INDEX_SCHEMA.names}, found {batch.schema.names}")
        columns: list[Any] = [np.from_dlpack(column) for column in batch.columns]  # to_numpy imports pandas
        return cls(*columns)


def is_mapped(out: Directory) -> bool:
    """Whether the index is too large to be read into the memory of each process."""
    return out.is_local and out.local_path(INDEX_FILE).stat().st_size > MAPPED_BYTES


def _map(path: Path) -> mmap.mmap:
    """A file whose pages are read one by one: those of a batch lie anywhere."""
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    data.madvise(mmap.MADV_RANDOM)
    return data


@dataclass(frozen=True)
class ShardSet:
    """A finished shard directory, checked by `open_shards`."""

    directory: Directory
    manifest: Manifest
    index: Index
    lanes: Collection[int] | None = None  # whose shards were checked; None: all

    @property
    def root(self) -> Path:
        """The directory on this machine. Raises ValueError for shards behind a URL."""
        return self.directory.local_path()


def open_shards(root: str | Path | Directory, lanes: Collection[int] | None = None) -> ShardSet:
    """Open a shard directory after checking that its files fit together: the archives by their sizes alone, the index
    by its checksum, since a wrong height would change crops, and a wrong label the evaluation, unseen.

    Of the archives, only those of ``lanes`` need to be there (by default all). A ShardError names the first file that
    is missing or does not fit.
    """
    out = Directory.at(root)
    manifest = Manifest.load(out)
    with announced("sharding", f"{out}"):
        check_sizes(out, manifest, lanes)
        index = Index.load(out, manifest.index)
    check_index(out, manifest, index)
    return ShardSet(out, manifest, index, lanes)


def check_sizes(out: Directory, manifest: Manifest, lanes: Collection[int] | None = None) -> None:
    expected = {shard.path: shard.num_bytes for shard in manifest.shards if lanes is None or shard.lane in lanes}
    expected[manifest.index.path] = manifest.index.num_bytes
    sizes = out.sizes_of(expected)
    for path, num_bytes in expected.items():
        if sizes.get(path) != num_bytes:
            found = f"found {sizes[path]}" if path in sizes else "it is missing"
            whose = "" if lanes is None else f" (this process reads lanes {', '.join(map(str, lanes))})"
            raise ShardError(
                f"{out}/{path}: expected {num_bytes} bytes, {found}{whose}; {repair_command(out)} restores it"
            )


def check_index(out: Directory, manifest: Manifest, index: Index) -> None:
    """That the index has the manifest's samples in the manifest's order, inside their archives; of one that is mapped,
    a thousand rows stand for all."""
    where = f"{out}/{INDEX_FILE}"
    counts, num_bytes = np.array([(shard.num_samples, shard.num_bytes) for shard in manifest.shards]).T
    step = max(1, len(index) // 1000) if is_mapped(out) else 1
    shard, offset, size = (column[::step] for column in (index.shard, index.offset, index.size))
    shards = np.searchsorted(np.cumsum(counts), np.arange(0, len(index), step), side="right")
    if not counts.sum() == manifest.num_samples == len(index) or (shard != shards).any():
        raise ShardError(f"{where}: its {len(index)} rows are not the samples of the manifest; build the shards again")
    wrong = np.flatnonzero((offset < 512) | (size < 1) | (offset + size > num_bytes[shards]))
    if len(wrong):
        row, found = step * wrong[0], manifest.shards[shards[wrong[0]]]
        raise ShardError(
            f"{where}: sample {row} claims bytes {index.offset[row]} to {index.offset[row] + index.size[row]} of "
            f"{found.path}, which has {found.num_bytes}; build the shards again"
        )


def fingerprint(shards: Sequence[Shard], num_lanes: int, policy: dict[str, Any], class_names: Sequence[str]) -> str:
    """xxh3_128 over everything that decides the samples, their bytes, their order and what their labels mean."""
    content = {
        "version": FORMAT_VERSION,
        "num_lanes": num_lanes,
        "policy": policy,
        "shards": [(shard.lane, shard.num_samples, shard.xxh3_128) for shard in shards],
        "class_names": list(class_names),
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def repair_command(out: Directory) -> str:
    """For messages: what mends shards that are damaged."""
    return f"`python -m sharding.verify {out} --repair`"


def _why_no_manifest(out: Directory) -> str:
    if not out.exists(""):
        return f"{out}: no such directory; `python -m sharding.build --out {out}` makes it"
    if out.exists(STATE):
        return f"{out}: the build is unfinished; run the same `python -m sharding.build` command again"
    return f"{out}: has no {MANIFEST_FILE}: not a shard directory; `python -m sharding.build` makes one"
