"""How fast shards are written: `sharding.build`, the writers one would use instead, and the limits of the machine.

    python -m benchmarks.sharding --dataset FOLDER --workers 1 2 --out results.json

All contestants read the same images in the same shuffled order through the same source, run in as many processes,
and end with every byte on the disk. Start-up is part of the time, so give thousands of images. Only
`sharding.build` looks into the images; ``decode`` and ``copy`` are the limits: libjpeg-turbo decoding every image
and nothing else, and the same bytes written to one file a worker and nothing else.
"""

import argparse
import importlib.util
import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from benchmarks.measure import Rate, interleave
from benchmarks.report import save, show
from sharding.arguments import Layout
from sharding.build import build
from sharding.command import command
from sharding.encode import Policy
from sharding.engine import Engine, in_process, processes
from sharding.plan import shuffled_rows
from sharding.source import Source, SourceSpec, open_source
from sharding.storage import Directory

_PEERS = {"webdataset": "webdataset", "mosaicml-streaming": "streaming", "litdata": "litdata"}  # name -> module


@dataclass(frozen=True)
class Share:
    """One process's part of the work."""

    folder: Path
    rows: list[int]


@dataclass(frozen=True)
class Work:
    spec: SourceSpec
    source: Source
    scratch: Path
    shard_bytes: int


def copy(source: Source, share: Share) -> None:
    with (share.folder / "bytes").open("wb") as file:
        for row in share.rows:
            file.write(source.read(row)[0])


def decode(source: Source, share: Share) -> None:
    for row in share.rows:
        simplejpeg.decode_jpeg(source.read(row)[0], strict=False)


def write_webdataset(source: Source, share: Share, shard_bytes: int) -> None:
    from webdataset import ShardWriter

    pattern = str(share.folder / "%06d.tar")
    with redirect_stdout(io.StringIO()), ShardWriter(pattern, maxcount=10**9, maxsize=shard_bytes) as writer:
        for row in share.rows:
            data, label = source.read(row)
            writer.write({"__key__": f"{row:08d}", "jpg": data, "cls": label})


def write_streaming(source: Source, share: Share, shard_bytes: int) -> None:
    from streaming import MDSWriter

    columns = {"image": "bytes", "label": "int"}
    with MDSWriter(out=str(share.folder / "mds"), columns=columns, size_limit=shard_bytes) as writer:
        for row in share.rows:
            data, label = source.read(row)
            writer.write({"image": data, "label": label})


def read_sample(source: Source, row: int) -> dict[str, Any]:
    data, label = source.read(row)
    return {"image": data, "label": label}


def write_litdata(work: Work, num_workers: int, folder: Path, rows: list[int]) -> None:
    """Its own processes, as its documentation recommends."""
    from litdata import optimize

    optimize(
        fn=partial(read_sample, work.source),
        inputs=rows,
        output_dir=str(folder / "litdata"),
        chunk_bytes=work.shard_bytes,
        num_workers=num_workers,
        verbose=False,
    )


def build_shards(work: Work, num_workers: int, folder: Path, _rows: list[int]) -> None:
    layout = Layout(lanes=4, shard_mb=work.shard_bytes / 1e6)
    build(work.spec, Directory.at(folder / "shards"), layout, Policy(), engine=_engine(num_workers), max_quarantine=1)


def in_shares(
    task: Callable[[Source, Share], None], work: Work, num_workers: int, folder: Path, rows: list[int]
) -> None:
    """The task on equal shares of the rows, one a process."""
    shares = [Share(folder / str(i), part.tolist()) for i, part in enumerate(np.array_split(rows, num_workers))]
    for share in shares:
        share.folder.mkdir()
    for _ in _engine(num_workers)(task, work.source, shares):
        pass


def images_per_second(run: Callable[[Work, int, Path, list[int]], None], work: Work, num_workers: int) -> float:
    """Of one run into an empty folder, until its files are on the disk."""
    rows = shuffled_rows(len(work.source), seed=0).tolist()
    folder = Path(tempfile.mkdtemp(dir=work.scratch))
    start = time.perf_counter()
    run(work, num_workers, folder, rows)
    for path in folder.rglob("*"):
        if path.is_file():
            _fsync(path)
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    return len(rows) / seconds


def _engine(num_workers: int) -> Engine:
    return in_process if num_workers == 1 else processes(num_workers)


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def contestants(work: Work) -> dict[str, Callable[[Work, int, Path, list[int]], None]]:
    found: dict[str, Callable[[Work, int, Path, list[int]], None]] = {
        "sharding.build": build_shards,
        "decode": partial(in_shares, decode),
        "copy": partial(in_shares, copy),
    }
    missing = [name for name, module in _PEERS.items() if importlib.util.find_spec(module) is None]
    if "webdataset" not in missing:
        found["webdataset"] = partial(in_shares, partial(write_webdataset, shard_bytes=work.shard_bytes))
    if "mosaicml-streaming" not in missing:
        found["mosaicml-streaming"] = partial(in_shares, partial(write_streaming, shard_bytes=work.shard_bytes))
    if "litdata" not in missing:
        found["litdata"] = write_litdata
    for name in missing:
        print(f"{name} is not installed and left out: pip install {name}")
    return found


def measure(work: Work, workers: Sequence[int], rounds: int) -> dict[str, Rate]:
    runs = {
        f"{name}, {n} workers": partial(images_per_second, run, work, n)
        for name, run in contestants(work).items()
        for n in workers
    }
    return interleave(runs, rounds)


@command("benchmarks.sharding")
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sharding", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default=SourceSpec.dataset, help="as of sharding.build (default: %(default)s)")
    parser.add_argument("--split", default=SourceSpec.split)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, len(os.sched_getaffinity(0))])
    parser.add_argument("--shard-mb", type=float, default=64.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure (default: the temporary folder)")
    parser.add_argument("--out", type=Path, help="save the results as JSON")
    options = parser.parse_args(argv)
    spec = SourceSpec(options.dataset, split=options.split)
    source = open_source(spec)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        work = Work(spec, source, Path(scratch), round(options.shard_mb * 1e6))
        rates = measure(work, options.workers, options.rounds)
    kilobytes = source.mean_bytes() / 1e3
    show(f"{len(source)} images of {kilobytes:.1f} kB", "images/s", rates, f"decode, {options.workers[0]} workers")
    if options.out:
        command = "python -m benchmarks.sharding " + " ".join(argv or sys.argv[1:])
        results = {"images": len(source), "kilobytes_per_image": kilobytes}
        save(options.out, command, {**results, "images_per_second": {k: r.rounds for k, r in rates.items()}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
