"""Which images were in a step of a run, and what the encoder saw of them.

    python -m train.replay runs/mine --step 4711

A line for each image of the global batch goes to the standard output; of two ranks, the first has the first half.
"""

import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from pipeline.preview import draw_plan
from pipeline.reading.reader import Reader
from pipeline.views import in_levels
from sharding.command import Parser, UserError, command
from sharding.manifest import open_shards
from train.config import load_config
from train.pretrain import build_loader, reading
from train.processes.distributed import World


@command("train.replay")
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m train.replay", "Show the images of a step of a run.")
    parser.add_argument("run", type=Path, help="its directory, where the contact sheet step-N.png goes too")
    parser.add_argument("--step", type=int, required=True, help="from 1, as messages and metrics.jsonl count")
    parser.add_argument("--images", type=int, default=16, help="rows of the contact sheet (default: 16)")
    options = parser.parse_args(arguments)
    if options.step < 1 or not 1 <= options.images <= 200:
        raise UserError("expected --step from 1 and --images from 1 to 200")
    config = load_config(options.run / "config.yaml")
    shards = open_shards(config.data.shards)
    data = config.data.model_copy(update={"prefetch": 1})  # of whole global batches
    in_pixels = config.model_copy(update={"views": in_levels(config.views), "data": data})
    with build_loader(in_pixels, shards, World(), options.step - 1) as loader:
        batch = next(loader)
        plan = loader.plan(options.step - 1)  # with what cannot be decoded replaced, as in the run
    rows = np.linspace(0, len(plan) - 1, min(options.images, len(plan))).astype(np.int64)
    views = [view.permute(0, 2, 3, 1)[rows].byte().cpu().numpy() for view in batch.views]
    names = dict(enumerate(shards.manifest.class_names))
    with closing(Reader(shards, reading(config.data, World())["cache"])) as reader:
        for row, sample in enumerate(plan.ids):
            label = int(shards.index.label[sample])
            print(f"row {row}: label {label} {names.get(label, '')}, {reader.describe(sample)}")
        figure = draw_plan(reader, plan.take(rows), views, f"{options.run}, step {options.step}", config.data.backend)
    path = options.run / f"step-{options.step:09d}.png"
    figure.savefig(path, dpi=150)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
