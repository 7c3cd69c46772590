"""What a shard directory holds: a table and a contact sheet.

python -m sharding.inspect /data/shards --out pictures
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from rich.console import Console
from rich.table import Table

from sharding.command import Parser, command
from sharding.manifest import ShardSet, open_shards
from sharding.planes import open_image

_QUANTILES = (0, 0.01, 0.5, 0.99, 1)
_THUMBNAIL = 128  # pixels
_CAPTION = 14  # pixels below each thumbnail


def summary(shards: ShardSet) -> Table:
    """Counts, and the spread of image and class sizes."""
    manifest, index = shards.manifest, shards.index
    copies = np.unique(index.xxh3_64, return_counts=True)[1]
    counts = f"{manifest.num_read:,}, {manifest.num_quarantined:,}, {manifest.num_surplus:,}"
    changed = ", ".join(f"{count:,} {change}" for change, count in manifest.changes.items())
    table = Table(title=f"{shards.directory}", show_header=False)
    table.add_row("source", f"{manifest.source['dataset']}, {manifest.source['split']}")
    table.add_row("images", f"{manifest.num_samples:,} in {len(manifest.shards)} shards")
    table.add_row("lanes", f"{manifest.num_lanes} of {manifest.num_samples_per_lane:,}")
    table.add_row("bytes", f"{sum(shard.num_bytes for shard in manifest.shards):,}")
    table.add_row("read, quarantined, surplus", counts)
    table.add_row("changed", changed or "none")
    table.add_row("classes", f"{len(manifest.class_names):,} named, {len(np.unique(index.label)):,} present")
    table.add_row("occur more than once", f"{copies[copies > 1].sum():,} images")
    table.add_row("fingerprint", manifest.fingerprint)
    measures = {
        "short side, pixels": np.minimum(index.height, index.width),
        "width / height": index.width / index.height,
        "size, kB": index.size / 1e3,
        "images a class": np.unique(index.label, return_counts=True)[1],
    }
    for name, values in measures.items():
        spread = ", ".join(f"{value:,.4g}" for value in np.quantile(values, _QUANTILES))
        table.add_row(f"{name}: least, 1 %, median, 99 %, most", spread)
    return table


def save_contact_sheet(shards: ShardSet, path: Path, columns: int = 12, rows: int = 8) -> None:
    """Evenly spaced samples, one row of the sheet after the other, each with its id and class."""
    index = shards.index
    ids = np.unique(np.linspace(0, len(index) - 1, columns * rows).astype(int))
    sheet = Image.new("RGB", (columns * _THUMBNAIL, -(-len(ids) // columns) * (_THUMBNAIL + _CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for position, sample in enumerate(ids.tolist()):
        start, archive = int(index.offset[sample]), shards.manifest.shards[index.shard[sample]].path
        image = open_image(shards.directory.read(archive, start, start + int(index.size[sample])))
        x, y = position % columns * _THUMBNAIL, position // columns * (_THUMBNAIL + _CAPTION)
        sheet.paste(ImageOps.contain(image, (_THUMBNAIL - 2, _THUMBNAIL - 2)), (x, y))
        draw.text((x + 1, y + _THUMBNAIL), f"{sample} {_class_name(shards, sample)}"[:20], fill="black")
    sheet.save(path)


def _class_name(shards: ShardSet, sample: int) -> str:
    label, names = int(shards.index.label[sample]), shards.manifest.class_names
    name = names[label] if 0 <= label < len(names) else str(label)
    return re.sub(r"^n\d{8}[\W_]+", "", name)  # the WordNet id in front of a name would fill the caption


@command("sharding.inspect")
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m sharding.inspect", __doc__)
    parser.add_argument("shards", help="directory or fsspec URL")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the picture (default: here)")
    args = parser.parse_args(arguments)
    shards = open_shards(args.shards)
    args.out.mkdir(parents=True, exist_ok=True)
    save_contact_sheet(shards, args.out / "contact-sheet.png")
    Console().print(summary(shards))
    print(f"picture: {args.out / 'contact-sheet.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
