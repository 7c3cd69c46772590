"""Methods of ours beside lightly's: each trained from the same initial weights by `train.pretrain`, and by lightly's
transform and loss in a DataLoader and a plain loop, then evaluated alike by `train.evaluate`.

    python -m benchmarks.beside_lightly --methods simclr --seeds 0 1 2

Recipes are `configs/cifar10-narrow-METHOD.yaml`, for both; the order of images and what views draw are not the same.
Each finished run is a line of ``--out`` at once; started again, the command leaves out what is there. Several of them
may write to the same file, for different methods or seeds. The table has means and standard deviations over seeds, and
the mean of the differences seed by seed with its 95 % interval.
"""

import argparse
import io
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from benchmarks.measure import Rate
from benchmarks.methods import top_1
from benchmarks.peers.steps import PlainStep, lightly
from benchmarks.report import show
from pipeline.loader import Batch
from pipeline.reading.reader import Reader
from pipeline.views import preset
from sharding.command import Parser, UserError, command
from sharding.manifest import ShardSet, open_shards
from sharding.progress import steps
from train.config import Config, load_config
from train.engine import checkpoint
from train.engine.automatic import environment
from train.engine.monitor import read_lines
from train.engine.plan import plan_run
from train.evaluate.__main__ import RESULTS
from train.evaluate.__main__ import main as evaluate
from train.pretrain import pretrain
from train.processes.distributed import World

METHODS = ("simclr", "barlow", "vicreg", "lejepa")
SIDES = ("ours", "lightly")
VIEWS = "simclr-cifar"


class Cell(NamedTuple):
    """One run of the comparison."""

    method: str
    seed: int
    side: str


@command("benchmarks.beside_lightly")
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    done = _rows(options.out)
    for cell in product(options.methods, options.seeds, SIDES):
        if Cell(*cell) not in done:
            row = _measured(Cell(*cell), options)
            with options.out.open("a") as file:
                file.write(json.dumps({**row, "environment": environment()}) + "\n")
    rows = _rows(options.out)
    table = (_cells(*names, options.seeds, rows) for names in product(options.methods, ("knn", "linear")))
    show("top-1, percent", ["method", *SIDES, "ours - lightly", "untrained"], table)
    return 0


def _measured(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    run = options.runs / "-".join(map(str, cell))
    settings = [f"data.shards={options.data}/train", f"run.dir={run}", f"run.seed={cell.seed}", *options.overrides]
    config = load_config(Path(f"configs/cifar10-narrow-{cell.method}.yaml"), settings)
    open_shards(f"{options.data}/test")  # before it trains, not hours later
    train = pretrain if cell.side == "ours" else train_by_lightly
    train(config, World())
    if evaluate(["--checkpoint", str(run), "--test", f"{options.data}/test", "--untrained"]):
        raise UserError(f"{run}: could not be evaluated; see the line above")
    (*_, evaluation), _ = read_lines(run / RESULTS, "results")
    accuracies = {encoder: top_1(results) for encoder, results in evaluation["results"].items()}
    row = {**cell._asdict(), "steps": evaluation["step"], "accuracy_percent": accuracies, "settings": settings}
    return row | {"data": evaluation["train"]["fingerprint"]}


def train_by_lightly(config: Config, world: World) -> None:
    """As lightly's examples have it; leaves a checkpoint."""
    shards = open_shards(config.data.shards)
    total_steps = plan_run(config, shards.manifest.num_samples).total_steps
    step = PlainStep(config, world, lightly)
    schedule = CosineAnnealingLR(step.optimizer, total_steps)
    for _, batch in zip(steps(range(total_steps), str(config.run.dir)), _batches(config, shards), strict=False):
        step(batch)
        schedule.step()
    state = {"method": step.method.state_dict(), "optimizer": step.optimizer.state_dict(), "step": total_steps}
    state |= {"identity": checkpoint.identity_of(config, shards.manifest.fingerprint)}
    checkpoint.save(config.run.dir, total_steps, state | {"config": config.model_dump(mode="json")})


def _batches(config: Config, shards: ShardSet) -> Iterator[Batch]:
    """Endless, shuffled, of lightly's views of images that are decoded once and stay in memory."""
    from lightly.transforms import SimCLRTransform

    if config.views != preset(VIEWS):
        raise UserError(f"views: expected the preset {VIEWS}, as lightly has it for CIFAR-10; leave views out")
    view = config.views[0]
    scaling = {"mean": list(view.mean), "std": list(view.std)}
    transform = SimCLRTransform(view.size, cj_strength=0.5, gaussian_blur=0.0, normalize=scaling)
    with closing(Reader(shards)) as reader:
        files = [reader.read(sample).tobytes() for sample in range(shards.manifest.num_samples)]
    images = [(Image.open(io.BytesIO(file)).convert("RGB"), sample) for sample, file in enumerate(files)]

    def collate(chosen: list[tuple[Image.Image, int]]) -> Batch:
        views = [torch.stack(made) for made in zip(*(transform(image) for image, _ in chosen), strict=True)]
        ids = torch.tensor([sample for _, sample in chosen])
        return Batch(0, views, torch.full_like(ids, -1), ids)

    torch.manual_seed(config.run.seed)
    loader: Any = DataLoader(images, config.run.global_batch_size, shuffle=True, drop_last=True, collate_fn=collate)  # type: ignore[arg-type]
    while True:
        yield from loader


def _rows(path: Path) -> dict[Cell, dict[str, Any]]:
    """The lines that there are, by cell. Raises UserError for a line that is none."""
    lines, problems = read_lines(path, "accuracy_percent")
    if problems:
        raise UserError(f"{problems[0]}; remove it")
    return {Cell(line["method"], line["seed"], line["side"]): line for line in lines}


def _cells(method: str, protocol: str, seeds: Sequence[int], rows: dict[Cell, dict[str, Any]]) -> list[str]:
    """Of the table: both sides with their standard deviations, and how far ours is above lightly's."""

    def found(side: str, encoder: str = "pretrained") -> Rate:
        return Rate(tuple(rows[Cell(method, s, side)]["accuracy_percent"][encoder][protocol] for s in seeds))

    ours, theirs = found("ours"), found("lightly")
    difference = ours.by_round(lambda a, b: a - b, theirs)
    deviations = [statistics.stdev(side.rounds) if len(seeds) > 1 else np.nan for side in (ours, theirs)]
    cells = [f"{side.mean:.1f} (sd {sd:.1f})" for side, sd in zip((ours, theirs), deviations, strict=True)]
    cells.append(f"{difference.mean:+.1f} ± {difference.margin:.1f}")
    return [f"{method}, {protocol}", *cells, f"{found('ours', 'untrained').mean:.1f}"]


def _parser() -> Parser:
    parser = Parser("python -m benchmarks.beside_lightly", "Train beside lightly.")
    add = parser.add_argument
    add("--data", type=Path, default=Path("data/cifar10-narrow"), help="shards: train/ and test/")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="NAME", help=f"of {', '.join(METHODS)}")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--runs", type=Path, default=Path("runs/beside-lightly"), help="a run goes to METHOD-SEED-SIDE in it")
    add("--out", type=Path, default=Path("benchmarks/results/beside-lightly-cifar10.jsonl"))
    add("overrides", nargs="*", metavar="section.field=value", help="for all runs, first on the line")
    return parser


if __name__ == "__main__":
    sys.exit(main())
