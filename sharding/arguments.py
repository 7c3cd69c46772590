"""Command line of `python -m sharding.build`."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from sharding.command import Parser
from sharding.encode import Policy
from sharding.source import SourceSpec

T = TypeVar("T", bound=Any)

_RANGES = [
    ("lanes", 1, 10_000),
    ("shard_mb", 0.001, 100_000),
    ("seed", 0, 2**63),
    ("short_side", 8, 100_000),
    ("quality", 1, 100),
    ("max_pixels", 1, 2**40),
    ("max_quarantine", 0, 1),
    ("per_class", 1, 2**31),
    ("fraction", 1e-9, 1),
    ("workers", 1, 10_000),
]
_DECODE_FREE_SIDE = 256  # pixels: ImageNet is then a sixth larger than its original files


@dataclass(frozen=True)
class Layout:
    """How samples are laid out. Recorded in the manifest."""

    lanes: int = 8
    shard_mb: float = 256  # target size, in 10^6 bytes
    seed: int = 0


def parse(description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, and ``specs`` (one a split), ``layout`` and ``policy`` made of them."""
    parser = Parser("python -m sharding.build", description)
    _add_source(parser)
    _add_output(parser)
    _add_run(parser)
    args = parser.parse_args(arguments)
    for name, low, high in _RANGES:
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} must be from {low} to {high}, not {value}")
    if args.per_class and args.fraction:
        parser.error("--per-class and --fraction say the same thing; choose one")
    if args.quality and args.decode_free:
        parser.error("--decode-free shards hold no JPEGs: there is no --quality")
    if args.quality and not args.short_side:
        parser.error("--quality is that of --short-side; without it only images that must be converted are encoded")
    if args.decode_free:
        args.short_side = args.short_side or _DECODE_FREE_SIDE
    args.quality = args.quality or Policy.quality
    args.specs = [replace(_taken(SourceSpec, args), split=split) for split in args.split]
    args.layout, args.policy = _taken(Layout, args), _taken(Policy, args)
    return args


def _taken(kind: type[T], args: argparse.Namespace) -> T:
    """An instance of a dataclass whose fields have the values of the arguments of their names."""
    return kind(**{field.name: getattr(args, field.name) for field in fields(kind) if hasattr(args, field.name)})


def _add_source(parser: argparse.ArgumentParser) -> None:
    spec = SourceSpec()
    add = parser.add_argument_group("source").add_argument
    add(
        "--dataset",
        default=spec.dataset,
        help="hub id, local folder (parquet, ImageFolder, WebDataset, ILSVRC's archives or shards of this program), "
        "fsspec URL of one, an archive of ILSVRC, or 'demo' (default: %(default)s)",
    )
    add("--config", help="configuration of the data set")
    add("--split", nargs="+", default=[spec.split], help="several: each into its own folder of --out (default: train)")
    add("--revision", help="of the data set on the hub")
    add("--image-column", help="default: the only image column")
    add("--label-column", help="default: the only class label column, if any")
    add(
        "--labels", metavar="FILE", help="classes of ILSVRC's validation images, one a line, or lines of file and class"
    )
    add("--classes", metavar="FILE", help="take only these: a class name or WordNet id a line")
    add("--subset", metavar="FILE", help="take only these: the name of an image file a line")
    add("--per-class", type=int, help="take so many images of each class, drawn with --seed")
    add("--fraction", type=float, help="take this part of each class, drawn with --seed")
    add("--cache", type=Path, help="where downloads are kept (default: the datasets library's cache)")


def _add_output(parser: argparse.ArgumentParser) -> None:
    layout, policy = Layout(), Policy()
    add = parser.add_argument_group("output").add_argument
    add("--out", required=True, help="directory or fsspec URL; an unfinished build there is continued")
    add("--lanes", type=int, default=layout.lanes, help="equal groups of shards (default: %(default)s)")
    add("--shard-mb", type=float, default=layout.shard_mb, help="target size (default: %(default)s)")
    add("--seed", type=int, default=layout.seed, help="of the shuffle (default: %(default)s)")
    add("--short-side", type=int, help="re-encode for faster decoding: larger images to this many pixels")
    add("--quality", type=int, help=f"JPEG quality for --short-side (default: {policy.quality})")
    add(
        "--decode-free",
        action="store_const",
        const=True,
        help=f"store planes of YCbCr 4:2:0 instead of JPEGs; --short-side is then {_DECODE_FREE_SIDE} by default",
    )
    add("--keep-truncated", action="store_const", const=True, help="keep JPEGs that end early, re-encoded")
    add("--max-pixels", type=int, default=policy.max_pixels, help="refuse larger images (default: %(default)s)")
    add("--max-quarantine", type=float, default=0.01, help="fraction of unusable images (default: %(default)s)")


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--dry-run", action="store_true", help="only estimate time, disk and memory")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)")
