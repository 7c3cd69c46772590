"""What `sharding.build --short-side` saves, and what it does to the views.

    python -m sharding.build --dataset X --out raw
    python -m sharding.build --dataset X --out small --short-side 320 --quality 90
    python -m benchmarks.reencoding raw small

Both directories hold the same images, matched by source row. Bytes and decoding speed (libjpeg-turbo, one thread) are
compared as they are. Views are cut by torchvision from both with the same draws: the same part of the image, mirrored
and coloured alike; what differs is re-encoding alone.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from benchmarks.measure import interleave, rate_of
from benchmarks.report import save, show
from pipeline.backends.torchvision import apply, decode
from pipeline.plan import plan_view
from pipeline.views import ViewSpec, preset
from sharding.command import UserError, command
from sharding.manifest import ShardSet, open_shards

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Difference:
    """Mean absolute difference of views, 0 to 255."""

    mean: float
    worst_image: float


def matching_ids(raw: ShardSet, small: ShardSet, count: int) -> tuple[Ids, Ids]:
    """Sample ids of up to `count` images in both directories. Raises ValueError when they share none."""
    _, in_raw, in_small = np.intersect1d(raw.index.source_row, small.index.source_row, return_indices=True)
    if raw.manifest.source["dataset"] != small.manifest.source["dataset"] or not len(in_raw):
        raise UserError(f"{raw.directory} and {small.directory} were not made from the same images")
    chosen = np.unique(np.linspace(0, len(in_raw) - 1, count).astype(int))
    return in_raw[chosen], in_small[chosen]


def encoded(shards: ShardSet, ids: Ids) -> list[bytes]:
    index = shards.index
    paths = [shards.manifest.shards[number].path for number in index.shard[ids]]
    ends = index.offset + index.size
    return [shards.directory.read(p, int(index.offset[i]), int(ends[i])) for p, i in zip(paths, ids, strict=True)]


def view_difference(spec: ViewSpec, shards: Sequence[ShardSet], ids: Sequence[Ids]) -> Difference:
    """Between views of (raw, small) with the same draws, which go by the raw sample's id."""
    epochs = np.zeros_like(ids[0])
    plans = [
        plan_view(spec, 0, 0, ids[0], epochs, s.index.height[i].astype(np.int64), s.index.width[i].astype(np.int64))
        for s, i in zip(shards, ids, strict=True)
    ]
    images = [encoded(s, i) for s, i in zip(shards, ids, strict=True)]
    differences = []
    for row, pair in enumerate(zip(*images, strict=True)):
        raw, small = (
            np.asarray(apply(decode(np.frombuffer(data, np.uint8)), plan, row)).astype(int)
            for data, plan in zip(pair, plans, strict=True)
        )
        differences.append(np.abs(raw - small).mean())
    return Difference(float(np.mean(differences)), float(np.max(differences)))


def decode_all(images: list[bytes]) -> int:
    for data in images:
        simplejpeg.decode_jpeg(data)
    return len(images)


@command("benchmarks.reencoding")
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reencoding",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("raw", type=Path, help="shards of the images as they are")
    parser.add_argument("small", type=Path, help="shards of the same images with --short-side")
    parser.add_argument("--images", type=int, default=256, help="to compare (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="save the results as JSON")
    options = parser.parse_args(argv)
    shards = open_shards(options.raw), open_shards(options.small)
    ids = matching_ids(*shards, count=options.images)
    kilobytes = [float(s.index.size.mean()) / 1e3 for s in shards]
    images = {name: encoded(s, i) for name, s, i in zip(("raw", "small"), shards, ids, strict=True)}
    contestants = {n: partial(rate_of, partial(decode_all, data), seconds=1, warmup=1) for n, data in images.items()}
    rates = interleave(contestants, options.rounds)
    show("decoding, one thread", "images/s", rates, "raw")
    print(f"bytes: {kilobytes[0]:.1f} kB an image raw, {kilobytes[1]:.1f} re-encoded")
    (spec,) = {spec.size: spec for spec in preset("simclr")}.values()
    crop_only = spec.model_copy(update={"jitter": 0.0, "grey": 0.0, "blur": 0.0})
    views = {"crop and resize": crop_only, "whole SimCLR view": spec}
    differences = {name: view_difference(view, shards, ids) for name, view in views.items()}
    for name, d in differences.items():
        print(f"{name}: views differ by {d.mean:.2f} of 255 on average, {d.worst_image:.2f} in the worst image")
    if options.out:
        results = {"kilobytes": kilobytes, "images_per_second": {n: r.rounds for n, r in rates.items()}}
        found = {name: [d.mean, d.worst_image] for name, d in differences.items()}
        save(options.out, "python -m benchmarks.reencoding", {**results, "view_difference": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
