"""Representations of a data set as a file: ``h`` (n, D) float32, ``labels`` (n,) and ``ids`` (n,) int64."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sharding.command import Parser, command
from sharding.manifest import open_shards
from train.engine.checkpoint import load_pretrained
from train.evaluate.data import Images, evaluation_view
from train.evaluate.features import FEATURES, extract
from train.pretrain import reading
from train.processes.distributed import session


@command("train.features")
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m train.features", "Write representations to a file.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run's directory, a checkpoint, or a file")
    parser.add_argument("--shards", required=True, help="directory or URL of the images")
    parser.add_argument("--out", type=Path, required=True, help="the file, .npz")
    parser.add_argument("settings", nargs="*", metavar="name=value", help="as of python -m train.evaluate")
    given = parser.parse_args(arguments)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with session("train.features") as world:
        pretrained, shards = load_pretrained(given.checkpoint, given.settings), open_shards(given.shards)
        images = Images(shards, np.arange(shards.manifest.num_samples))
        view = evaluation_view(pretrained.config.views, shards)
        folder, options = pretrained.directory / FEATURES, reading(pretrained.config.data, world)
        made = extract(pretrained.encoder, images, view, folder, world, **options)
    if world.is_main:  # all of them as they are mapped, or a copy in memory where some are left out
        h = made.h if len(made) == len(made.h) else made.h[made.ids]
        np.savez(given.out, h=h, labels=made.labels, ids=made.ids)
    return 0


if __name__ == "__main__":
    sys.exit(main())
