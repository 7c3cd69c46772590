"""Check a shard directory against its manifest, and mend it.

    python -m sharding.verify /data/shards              # sizes, checksums, indices
    python -m sharding.verify /data/shards --decode     # and every image
    python -m sharding.verify /data/shards --repair     # rebuild what is damaged, from the source

Ends with 0 when everything is sound, 1 when something is damaged, 2 when there is nothing to check.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sharding.arguments import Parser
from sharding.command import command
from sharding.encode import BadImageError, Policy, encode
from sharding.engine import Engine, in_process, processes
from sharding.manifest import INDEX_FILE, MANIFEST_FILE, Index, Manifest, ShardError, check_fingerprint, check_index
from sharding.part import dali_index, index_name
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
class Check:
    """What the checks of all shards share."""

    out: Directory
    manifest: Manifest
    sizes: dict[str, int]
    decode: bool


_index = functools.lru_cache(maxsize=1)(Index.load)  # once in each process


def verify(
    out: Directory, *, decode: bool = False, engine: Engine = in_process, progress: bool = False
) -> list[Problem]:
    """All that is wrong with a shard directory.

    Raises:
        ShardError: there is no readable manifest.
    """
    _index.cache_clear()
    sizes = out.sizes()
    check = Check(out, Manifest.load(out), sizes, decode)
    problems = [*_check_manifest(check), *_check_strays(check), *(damage := _check_index(check))]
    shards = range(len(check.manifest.shards))
    with bar() as shown:
        results = track(
            engine(_check_without_index if damage else check_shard, check, shards),
            shown if progress else None,
            "verifying",
            total=check.manifest.num_samples,
            size=lambda found: (found[1], found[2]),
        )
        problems += [problem for found, _, _ in results for problem in found]
    return sorted(problems, key=lambda problem: (problem.path, problem.key))


def check_shard(check: Check, number: int) -> tuple[list[Problem], int, int]:
    """Problems of one shard and its DALI index, its samples and its bytes."""
    shard = check.manifest.shards[number]
    problems = _check_archive(check, number)
    if problems or check.decode:
        problems += _check_samples(check, number) if shard.path in check.sizes else []
    return problems + _check_dali_index(check, number), shard.num_samples, shard.num_bytes


def _check_without_index(check: Check, number: int) -> tuple[list[Problem], int, int]:
    shard = check.manifest.shards[number]
    return _check_archive(check, number), shard.num_samples, shard.num_bytes


def _check_manifest(check: Check) -> list[Problem]:
    try:
        check_fingerprint(check.out, check.manifest)
    except ShardError as error:
        return [Problem(MANIFEST_FILE, str(error))]
    return []


def _check_strays(check: Check) -> list[Problem]:
    """Archives that readers of `lane-*/*.tar` would take for data."""
    known = {shard.path for shard in check.manifest.shards}
    strays = [n for n in check.sizes if n.startswith("lane-") and n.endswith(".tar") and n not in known]
    return [Problem(name, "is not in the manifest") for name in strays]


def _check_index(check: Check) -> list[Problem]:
    expected = check.manifest.index
    problems = _check_file(check, INDEX_FILE, expected.num_bytes, expected.xxh3_128)
    if problems:
        return problems
    try:
        check_index(check.out, check.manifest, _index(check.out))
    except ShardError as error:
        return [Problem(INDEX_FILE, str(error))]
    return []


def _check_archive(check: Check, number: int) -> list[Problem]:
    shard = check.manifest.shards[number]
    return _check_file(check, shard.path, shard.num_bytes, shard.xxh3_128)


def _check_file(check: Check, name: str, num_bytes: int, digest: str) -> list[Problem]:
    if name not in check.sizes:
        return [Problem(name, "is missing")]
    if check.sizes[name] != num_bytes:
        return [Problem(name, f"expected {num_bytes} bytes, found {check.sizes[name]}")]
    with check.out.open(name) as file:
        found = checksum(file)
    return [] if found == digest else [Problem(name, "its checksum is not the manifest's")]


def _check_samples(check: Check, number: int) -> list[Problem]:
    """Which samples of an archive are damaged: each must come out of the encoder as it went in."""
    path = check.manifest.shards[number].path
    policy = Policy(max_pixels=check.manifest.policy["max_pixels"])
    index = _index(check.out)
    problems = []
    with check.out.open(path) as file:
        for row in index.rows_of(number):
            key = f"{index.source_row[row]:08d}"
            file.seek(index.offset[row] - 512)
            header, data = file.read(512), file.read(index.size[row])
            if not header.startswith(f"{key}.jpg\0".encode()):
                problems.append(Problem(path, "its tar header is damaged", key))
            elif reason := _damage(data, policy, (index.height[row], index.width[row])):
                problems.append(Problem(path, reason, key))
    return problems


def _damage(data: bytes, policy: Policy, size: tuple[int, int]) -> str:
    try:
        image = encode(data, policy)
    except BadImageError as error:
        return str(error)
    if image.change:
        return f"is not in the form that backends decode alike: {image.change}"
    if (image.height, image.width) != size:
        return f"decodes to {image.width} x {image.height} pixels, the index says {size[1]} x {size[0]}"
    return ""


def _check_dali_index(check: Check, number: int) -> list[Problem]:
    name = index_name(check.manifest.shards[number].path)
    if name not in check.sizes:
        return [Problem(name, "is missing")]
    if check.out.read(name) != dali_index(_index(check.out), number):
        return [Problem(name, "does not fit its archive: DALI would read wrong samples or crash")]
    return []


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m sharding.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("shards", help="directory or fsspec URL")
    add("--decode", action="store_true", help="check every image as well")
    add("--repair", action="store_true", help="rebuild damaged files from the source")
    add("--dataset", help="where the source is now, for --repair (default: where it was)")
    add("--cache", type=Path, help="as of sharding.build")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)")
    return parser.parse_args(argv)


@command("sharding.verify")
def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    out = Directory.at(args.shards)
    engine = processes(args.workers)
    problems = verify(out, decode=args.decode, engine=engine, progress=True)
    for problem in problems:
        print(problem)
    if problems and args.repair:
        repair(out, sorted({problem.path for problem in problems}), args.dataset, args.cache)
        problems = verify(out, decode=args.decode, engine=engine)
        for problem in problems:
            print(f"after the repair: {problem}")
    manifest = Manifest.load(out)
    state = f"{len(problems)} problems" if problems else "sound"
    print(f"{out}: {manifest.num_samples} images in {len(manifest.shards)} shards: {state}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
