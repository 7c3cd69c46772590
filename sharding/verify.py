"""Check a shard directory against its manifest, and repair it.

    python -m sharding.verify /data/shards              # sizes, checksums, indices
    python -m sharding.verify /data/shards --decode     # and every image
    python -m sharding.verify /data/shards --repair     # rebuild what is damaged, from the source

Ends with 0 when everything is sound, 1 when something is damaged, 2 when there is nothing to check.
"""

import argparse
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from sharding.command import Parser, command
from sharding.encode import Policy, encode
from sharding.engine import Engine, in_process, processes
from sharding.manifest import INDEX_FILE, MANIFEST_COPY, MANIFEST_FILE, Index, Manifest, ShardError, check_index
from sharding.part import dali_index, index_name
from sharding.planes import extension, split_planes
from sharding.progress import bar, track
from sharding.repair import repair
from sharding.storage import Directory, checksum


@dataclass(frozen=True)
class Problem:
    path: str  # of the file, relative to the directory
    reason: str
    key: str = ""  # of the sample, where one is known

    def __str__(self) -> str:
        return f"{self.path}{f': sample {self.key}' if self.key else ''}: {self.reason}"


@dataclass(frozen=True)
class Expectation:
    """What all shards are checked against."""

    out: Directory
    manifest: Manifest
    sizes: dict[str, int]  # as found
    index_is_sound: bool
    decode: bool


_index = functools.lru_cache(maxsize=1)(Index.load)  # once in each process


def verify(
    out: Directory, *, decode: bool = False, engine: Engine = in_process, progress: bool = False
) -> list[Problem]:
    """All that is wrong with a shard directory. Raises ShardError where there is no readable manifest."""
    _index.cache_clear()
    sizes = out.sizes()
    manifest = Manifest.load(out)
    problems = [*_check_manifest(out, manifest, sizes), *(damage := _check_index(out, manifest, sizes))]
    expected = Expectation(out, manifest, sizes, not damage, decode)
    with bar() as shown:
        checked = track(
            engine(check_shard, expected, range(len(manifest.shards))),
            shown if progress else None,
            "verifying",
            total=manifest.num_samples,
            size=lambda result: (manifest.shards[result[0]].num_samples, manifest.shards[result[0]].num_bytes),
        )
        problems += [problem for _, found in checked for problem in found]
    return sorted(problems, key=lambda problem: (problem.path, problem.key))


def check_shard(expected: Expectation, number: int) -> tuple[int, list[Problem]]:
    """The number, and the problems of this shard, of its samples and of its DALI index."""
    shard = expected.manifest.shards[number]
    problems = _check_file(expected.out, expected.sizes, shard.path, shard.num_bytes, shard.xxh3_128)
    if expected.index_is_sound:
        if (problems or expected.decode) and shard.path in expected.sizes:
            problems += _check_samples(expected, number)
        problems += _check_dali_index(expected, number)
    return number, problems


def _check_manifest(out: Directory, manifest: Manifest, sizes: dict[str, int]) -> Iterator[Problem]:
    for name in (MANIFEST_FILE, *({MANIFEST_COPY} & sizes.keys())):
        try:
            Manifest.read(out, name)
        except ShardError as error:
            yield Problem(name, str(error))
    known = {shard.path for shard in manifest.shards}
    for name in sizes:
        if name.startswith("lane-") and name.endswith(".tar") and name not in known:
            yield Problem(name, "is not in the manifest")  # readers of ``lane-*/*.tar`` would take it for data


def _check_index(out: Directory, manifest: Manifest, sizes: dict[str, int]) -> list[Problem]:
    problems = _check_file(out, sizes, INDEX_FILE, manifest.index.num_bytes, manifest.index.xxh3_128)
    try:
        if not problems:
            check_index(out, manifest, _index(out))
    except ShardError as error:
        return [Problem(INDEX_FILE, str(error))]
    return problems


def _check_file(out: Directory, sizes: dict[str, int], name: str, num_bytes: int, digest: str) -> list[Problem]:
    if name not in sizes:
        return [Problem(name, "is missing")]
    if sizes[name] != num_bytes:
        return [Problem(name, f"expected {num_bytes} bytes, found {sizes[name]}")]
    with out.open(name) as file:
        return [] if checksum(file) == digest else [Problem(name, "its checksum is not the manifest's")]


def _check_samples(expected: Expectation, number: int) -> Iterator[Problem]:
    """Which samples of an archive are damaged: each must come out of the encoder as it went in."""
    manifest = expected.manifest
    path = manifest.shards[number].path
    policy = Policy(max_pixels=manifest.policy["max_pixels"], decode_free=manifest.is_decode_free)
    index = _index(expected.out)
    with expected.out.open(path) as file:
        for row in index.rows_of(number):
            key = f"{index.source_row[row]:08d}"
            file.seek(index.offset[row] - 512)
            header, data = file.read(512), file.read(index.size[row])
            if not header.startswith(f"{key}.{extension(manifest.is_decode_free)}\0".encode()):
                yield Problem(path, "its tar header is damaged", key)
            elif reason := _damage(data, policy, (index.height[row], index.width[row])):
                yield Problem(path, reason, key)
            elif xxhash.xxh3_64_intdigest(data) != int(index.xxh3_64[row]):
                yield Problem(path, "its checksum is not the index's", key)


def _damage(data: bytes, policy: Policy, size: tuple[int, int]) -> str:
    try:
        if policy.decode_free:  # any frame shows something: only its checksum can tell
            split_planes(np.frombuffer(data, np.uint8), *size)
            return ""
        image = encode(data, policy)
    except ValueError as error:
        return str(error)
    if image.change:
        return f"is not in the form that backends decode alike: {image.change}"
    if (image.height, image.width) != size:
        return f"decodes to {image.width} x {image.height} pixels, the index says {size[1]} x {size[0]}"
    return ""


def _check_dali_index(expected: Expectation, number: int) -> list[Problem]:
    name = index_name(expected.manifest.shards[number].path)
    if name not in expected.sizes:
        return [Problem(name, "is missing")]
    if expected.out.read(name) != dali_index(expected.manifest, _index(expected.out), number):
        return [Problem(name, "does not fit its archive: DALI would read wrong samples or crash")]
    return []


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("python -m sharding.verify", __doc__)
    add = parser.add_argument
    add("shards", help="directory or fsspec URL")
    add("--decode", action="store_true", help="check every image as well")
    add("--repair", action="store_true", help="rebuild damaged files from the source")
    add("--dataset", help="where the source is now, for --repair (default: where it was)")
    add("--cache", type=Path, help="as of sharding.build")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)")
    return parser.parse_args(arguments)


@command("sharding.verify")
def main(arguments: Sequence[str] | None = None) -> int:
    args = _parse(arguments)
    out = Directory.at(args.shards)
    engine = processes(args.workers)
    problems = verify(out, decode=args.decode, engine=engine, progress=True)
    print(*problems, sep="\n", end="\n" if problems else "")
    if problems and args.repair:
        repair(out, sorted({problem.path for problem in problems}), args.dataset, args.cache)
        problems = verify(out, decode=args.decode, engine=engine)
        print(*(f"after the repair: {problem}\n" for problem in problems), sep="", end="")
    manifest = Manifest.load(out)
    state = f"{len(problems)} problems" if problems else "sound"
    print(f"{out}: {manifest.num_samples} images in {len(manifest.shards)} shards: {state}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
