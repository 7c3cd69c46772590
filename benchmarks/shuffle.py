"""How well the order shuffles, for the full permutation and for windows of shards, against independent draws.

    python -m benchmarks.shuffle                                  # a data set of ImageNet's size, nothing is read
    python -m benchmarks.shuffle --shards /data/shards            # the classes and shards of real ones

Two measures over the batches of a pass, each as a fraction of its value for a uniformly random permutation:

class entropy     mean entropy of the class labels in a batch; below 1, batches have fewer classes than by chance.
                  The sharder shuffles samples over shards, so this stays near 1 even for a window of one shard
neighbours apart  mean distance (in batches, from one pass to the next) between samples that met in a batch; near 0,
                  the same samples meet again: what a contrastive loss, whose negatives are the batch, would suffer from
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.order import Shuffled, lane_shard_sizes
from sharding.command import command
from sharding.manifest import open_shards

Ids = NDArray[np.int64]
Labels = NDArray[np.int32]


@dataclass(frozen=True)
class Data:
    """What of a data set decides how its batches mix: samples of each shard by lane, and labels by sample id."""

    shard_sizes: tuple[tuple[int, ...], ...]
    labels: Labels


@dataclass(frozen=True)
class Quality:
    class_entropy: float  # of a batch, relative to a random permutation
    neighbours_apart: float  # in the next pass, relative to a random permutation


@command("benchmarks.shuffle")
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    data = read_data(options.shards) if options.shards else imagenet_like()
    qualities = {name: measure(data, w, options) for name, w in windows(options.windows).items()}
    ideal = measure_random(data, options)
    report(data, qualities, ideal, options)
    return 0


def imagenet_like(lanes: int = 8, shards: int = 70, samples: int = 2288, classes: int = 1000) -> Data:
    """1.28 million samples in random order, as the sharder lays them out."""
    sizes = tuple((samples,) * shards for _ in range(lanes))
    labels = np.random.default_rng(0).integers(0, classes, lanes * shards * samples).astype(np.int32)
    return Data(sizes, labels)


def read_data(shards: Path) -> Data:
    opened = open_shards(shards)
    return Data(lane_shard_sizes(opened), np.asarray(opened.index.label))


def windows(numbers: Sequence[int]) -> dict[str, int | None]:
    return {"full permutation": None, **{f"window {number}": number for number in numbers}}


def measure(data: Data, window: int | None, options: argparse.Namespace) -> Quality:
    order = Shuffled(data.shard_sizes, options.seed, options.batch_size, window)
    steps = order.num_samples // options.batch_size
    passes = [np.stack([order.batch(first + step)[0] for step in range(steps)]) for first in (0, steps)]
    return _relative(passes, data, options)


def measure_random(data: Data, options: argparse.Namespace) -> Quality:
    """The measures of a random permutation drawn in another way: how far from 1 chance alone brings them."""
    return _relative(_random_passes(data, options, seed=1), data, options)


def _relative(passes: list[Ids], data: Data, options: argparse.Namespace) -> Quality:
    found, ideal = _absolute(passes, data), _absolute(_random_passes(data, options, seed=0), data)
    return Quality(found.class_entropy / ideal.class_entropy, found.neighbours_apart / ideal.neighbours_apart)


def _absolute(passes: list[Ids], data: Data) -> Quality:
    entropies = [label_entropy(data.labels[batch]) for batch in passes[0]]
    return Quality(float(np.mean(entropies)), distance_of_neighbours(passes[0], passes[1], len(data.labels)))


def label_entropy(labels: Labels) -> float:
    """In bits."""
    counts = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(counts * np.log2(counts)).sum())


def distance_of_neighbours(first: Ids, second: Ids, num_samples: int) -> float:
    """Mean distance in ``second`` (S, B), in batches, of pairs that share a batch of ``first`` (S, B)."""
    batch_of = np.full(num_samples, -1)
    batch_of[second.ravel()] = np.repeat(np.arange(len(second)), second.shape[1])
    left, right = batch_of[first], batch_of[np.roll(first, 1, axis=1)]
    known = (left >= 0) & (right >= 0)  # all but those in the batch that the pass ends within
    return float(np.abs(left - right)[known].mean())


def _random_passes(data: Data, options: argparse.Namespace, seed: int) -> list[Ids]:
    """Two passes, each lane in random order and the batch divided among lanes as by `Shuffled`."""
    rng = np.random.default_rng(seed)
    per_lane, lanes = sum(data.shard_sizes[0]), len(data.shard_sizes)
    share = options.batch_size // lanes
    steps = per_lane // share
    passes = []
    for _ in range(2):
        shuffled = [lane * per_lane + rng.permutation(per_lane)[: steps * share] for lane in range(lanes)]
        passes.append(np.concatenate([ids.reshape(steps, share) for ids in shuffled], axis=1))
    return passes


def report(data: Data, qualities: dict[str, Quality], ideal: Quality, options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    shards = len(data.shard_sizes[0])
    title = (
        f"{len(data.labels)} samples, {len(data.shard_sizes)} lanes of {shards} shards, batches of {options.batch_size}"
    )
    table = Table("order", "class entropy", "neighbours apart", title=title, title_justify="left")
    rows = {**qualities, "random (another draw)": ideal}
    for name, quality in rows.items():
        table.add_row(name, f"{quality.class_entropy:.4f}", f"{quality.neighbours_apart:.3f}")
    Console().print(table)
    if options.out:
        from benchmarks.report import save

        results = {name: asdict(quality) for name, quality in rows.items()}
        save(options.out, "python -m benchmarks.shuffle " + " ".join(sys.argv[1:]), results)
    if options.picture:
        draw(qualities, options.picture)
        print(options.picture)


def draw(qualities: dict[str, Quality], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    names = list(qualities)
    for offset, label in ((-0.2, "class_entropy"), (0.2, "neighbours_apart")):
        heights = [getattr(quality, label) for quality in qualities.values()]
        bars = axes.bar(np.arange(len(names)) + offset, heights, 0.38, label=label.replace("_", " "))
        axes.bar_label(bars, fmt="%.3f", fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--", label="random permutation")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 1.25)
    axes.legend(loc="lower right", fontsize=8)
    axes.set_title("How well the order shuffles", fontsize=10)
    figure.savefig(path, dpi=150)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shuffle", description="Measure how well batches mix.")
    parser.add_argument("--shards", help="directory made by sharding.build (default: ImageNet's sizes)")
    parser.add_argument("--windows", nargs="+", type=int, default=[1, 2, 4, 8, 16], help="shards at a time to try")
    parser.add_argument("--batch-size", type=int, default=4096, help="global batch (default: 4096)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order (default: 0)")
    parser.add_argument("--picture", type=Path, help="PNG file to draw")
    parser.add_argument("--out", type=Path, help="JSON file for the results, machine and versions")
    return parser


if __name__ == "__main__":
    sys.exit(main())
