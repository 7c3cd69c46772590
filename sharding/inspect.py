"""What a shard directory holds: a table, histograms and a contact sheet.

python -m sharding.inspect /data/shards --out pictures
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps
from rich.console import Console
from rich.table import Table

from sharding.arguments import Parser
from sharding.command import command
from sharding.manifest import ShardSet, open_shards

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_QUANTILES = (0, 0.01, 0.5, 0.99, 1)
_THUMBNAIL = 128  # pixels
_CAPTION = 14  # pixels below each thumbnail


def summary(shards: ShardSet) -> Table:
    """Counts, and the spread of image sizes."""
    manifest, index = shards.manifest, shards.index
    table = Table(title=f"{shards.directory}", show_header=False)
    for name, value in [
        ("source", f"{manifest.source['dataset']}, {manifest.source['split']}"),
        ("images", f"{manifest.num_samples:,} in {len(manifest.shards)} shards"),
        ("lanes", f"{manifest.num_lanes} of {manifest.num_samples_per_lane:,}"),
        ("bytes", f"{sum(shard.num_bytes for shard in manifest.shards):,}"),
        (
            "read, quarantined, surplus",
            f"{manifest.num_read:,}, {manifest.num_quarantined:,}, {manifest.num_surplus:,}",
        ),
        ("changed", ", ".join(f"{count:,} {change}" for change, count in manifest.changes.items()) or "none"),
        ("classes", f"{len(manifest.class_names):,} named, {len(np.unique(index.label)):,} present"),
        ("occur more than once", f"{_num_repeated(index.xxh3_64):,} images"),
        ("fingerprint", manifest.fingerprint),
    ]:
        table.add_row(name, value)
    for name, values in _measures(shards).items():
        spread = ", ".join(f"{value:,.4g}" for value in np.quantile(values, _QUANTILES))
        table.add_row(f"{name}: least, 1 %, median, 99 %, most", spread)
    return table


def _num_repeated(digests: NDArray[np.uint64]) -> int:
    """How many images have the same bytes as a different one."""
    counts = np.unique(digests, return_counts=True)[1]
    return int(counts[counts > 1].sum())


def save_histograms(shards: ShardSet, path: Path) -> None:
    """Distributions of image sizes and of class sizes, as one picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    for axis, (name, values) in zip(axes, _measures(shards).items(), strict=False):
        axis.hist(values, bins=60, color="tab:blue")
        axis.set(xlabel=name, ylabel="images")
    _draw_classes(axes[3], shards.index.label)
    figure.suptitle(f"{shards.manifest.num_samples:,} images, {shards.manifest.source['dataset']}")
    figure.savefig(path, dpi=100)


def save_contact_sheet(shards: ShardSet, path: Path, columns: int = 12, rows: int = 8) -> None:
    """Evenly spaced samples, one row of the sheet after the other, each with its id and class."""
    ids = np.unique(np.linspace(0, len(shards.index) - 1, columns * rows).astype(int))
    cell = (_THUMBNAIL, _THUMBNAIL + _CAPTION)
    sheet = Image.new("RGB", (columns * cell[0], -(-len(ids) // columns) * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for position, sample in enumerate(ids.tolist()):
        x, y = position % columns * cell[0], position // columns * cell[1]
        thumbnail = ImageOps.contain(_read(shards, sample), (_THUMBNAIL - 2, _THUMBNAIL - 2))
        sheet.paste(thumbnail, (x, y))
        draw.text((x + 1, y + _THUMBNAIL), f"{sample} {_class_name(shards, sample)}"[:20], fill="black")
    sheet.save(path)


def _measures(shards: ShardSet) -> dict[str, NDArray]:
    index = shards.index
    return {
        "short side, pixels": np.minimum(index.height, index.width),
        "width / height": index.width / index.height,
        "size, kB": index.size / 1e3,
    }


def _draw_classes(axis: Axes, labels: NDArray[np.int32]) -> None:
    counts = np.sort(np.unique(labels, return_counts=True)[1])[::-1]
    axis.fill_between(np.arange(len(counts) + 1), [*counts, counts[-1]], step="post", color="tab:blue")
    axis.set(xlabel="class, largest first", ylabel="images", ylim=(0, 1.1 * counts[0]))
    axis.locator_params(integer=True)


def _read(shards: ShardSet, sample: int) -> Image.Image:
    index = shards.index
    start = int(index.offset[sample])
    path = shards.manifest.shards[index.shard[sample]].path
    return Image.open(io.BytesIO(shards.directory.read(path, start, start + int(index.size[sample])))).convert("RGB")


def _class_name(shards: ShardSet, sample: int) -> str:
    label, names = int(shards.index.label[sample]), shards.manifest.class_names
    name = names[label] if 0 <= label < len(names) else str(label)
    return re.sub(r"^n\d{8}[\W_]+", "", name)  # the WordNet id in front of a name would fill the caption


@command("sharding.inspect")
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m sharding.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", help="directory or fsspec URL")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the pictures (default: here)")
    args = parser.parse_args(argv)
    shards = open_shards(args.shards)
    args.out.mkdir(parents=True, exist_ok=True)
    save_histograms(shards, args.out / "histograms.png")
    save_contact_sheet(shards, args.out / "contact-sheet.png")
    Console().print(summary(shards))
    print(f"pictures: {args.out / 'histograms.png'}, {args.out / 'contact-sheet.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
